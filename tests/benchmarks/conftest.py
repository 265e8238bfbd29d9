"""What the tests of the GPU command share."""

import pytest

from benchmarks import gpu


@pytest.fixture
def stages(monkeypatch):
    """Replace the stages of the command."""
    return lambda *made: monkeypatch.setattr(gpu, "STAGES", made)
