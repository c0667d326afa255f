"""What a loss over ranks costs: a model of it, what gloo on one machine shows of that, and what follows for GPUs."""
