"""What the service relies on; whether the engine is right, the plugin's tests say."""

from pathlib import Path

import pytest

from eptc.runtime import Engine


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Engine:
    """The engine that is deployed."""
    bundle: Path | None = request.config.getoption("--eptc-bundle")
    if bundle is None:
        pytest.skip("no --eptc-bundle was given")
    return Engine.load(bundle, providers=["cpu"])


def test_every_text_gets_a_label(engine: Engine) -> None:
    answers = engine.classify(["good", "bad and dull", ""])
    assert engine.task is not None
    assert all(answer.label in engine.task.labels for answer in answers)
