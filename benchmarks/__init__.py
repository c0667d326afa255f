"""Speed and memory against what users run today. `make bench` runs the report; figures go to docs/figures."""
