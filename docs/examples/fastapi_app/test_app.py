"""pytest test_app.py"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from app import app
from fastapi.testclient import TestClient


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app) as client:  # as a block: only then there is a lifespan
        yield client


def test_a_nap(client: TestClient) -> None:
    answer = client.post("/naps", json={"name": "Ada"})
    assert (answer.status_code, answer.json()) == (
        200,
        {"rested": {"who": "Ada", "where": "bed"}},
    )


def test_a_nap_that_fails(client: TestClient) -> None:
    answer = client.post("/naps", json={"name": "Ada", "where": None})
    assert answer.status_code == 422
    assert "Undefined variable" in answer.json()["detail"]


def test_a_nap_that_takes_too_long(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.LONGEST_WAIT", 0.1)
    answer = client.post("/naps", json={"name": "Ada", "duration_ms": 60_000})
    assert answer.status_code == 504


def test_a_run_that_is_followed(client: TestClient) -> None:
    run_id = client.post("/runs", json={"name": "Bo"}).json()["run_id"]
    events = client.get(f"/runs/{run_id}/events").text
    assert "event: RunCompleted" in events
    assert client.get(f"/runs/{run_id}").json()["rested"]["who"] == "Bo"


@pytest.mark.parametrize("run_id", ["x", "00000000-0000-0000-0000-000000000000"])
def test_a_run_that_nobody_knows(client: TestClient, run_id: str) -> None:
    assert client.get(f"/runs/{run_id}").status_code == 404
    assert client.get(f"/runs/{run_id}/events").status_code == 404


def test_how_it_stands(client: TestClient) -> None:
    assert client.get("/ready").json() == client.get("/live").json()
