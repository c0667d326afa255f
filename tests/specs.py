"""The specs of all ops, found in tests/<op>/spec.py, and their calls as cases for parametrize."""

import importlib
from pathlib import Path

import pytest

from tests.contract import Spec

FOLDERS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/spec.py"))
MODULES = [importlib.import_module(f"tests.{folder}.spec") for folder in FOLDERS]
SPECS = [spec for module in MODULES for spec in vars(module).values() if isinstance(spec, Spec)]
CALLS = [pytest.param(spec, call, id=f"{spec.op}-{name}") for spec in SPECS for name, call in spec.calls.items()]
