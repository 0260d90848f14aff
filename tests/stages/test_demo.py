"""The demonstration root: what it holds, made by the stages themselves, only shorter."""

from rich.console import Console
from starlette.testclient import TestClient

from nmoe.records.live import Live
from stages.demo import RATES, WIDTHS, make
from stages.viz.server import Server


def test_the_demonstration_has_an_ablation_a_sweep_and_a_run_that_was_killed(tmp_path):
  root = tmp_path / "root"
  make(root, Console(quiet=True), steps=8, seeds=1)
  client = TestClient(Server(Live(root, tmp_path / "cache")).app(), base_url="http://127.0.0.1")
  seen = client.get("/api/runs").json()
  stages = {e["stage"]: e for e in seen["experiments"]}
  assert stages.keys() == {"ablate", "demo", "check"}
  ablation = client.get(f"/api/experiment/{stages['ablate']['id']}").json()
  assert [arm["name"] for arm in ablation["arms"]] == ["baseline", "variant"]
  assert ablation["report"] and ablation["verdict"] == "inconclusive", "of one seed"
  sides = [arm["runs"][0]["id"] for arm in ablation["arms"]]
  changes = client.get("/api/compare", params=dict(zip("ab", sides, strict=True))).json()["changes"]
  own = [row[0] for row in changes["rows"] if not row[0].startswith("experiment.")]
  assert own == ["moe.top_k"]
  assert client.get(f"/api/loads?run={sides[0]}&layer=0").content.count(b'"experts": 16') == 1
  sweep = client.get(f"/api/experiment/{stages['demo']['id']}").json()
  points = {(arm["point"]["width"], arm["point"]["lr"]) for arm in sweep["arms"]}
  assert points == {(width, rate) for width in WIDTHS for rate in RATES}
  killed = [r["id"] for r in seen["runs"] if r["experiment"] == stages["check"]["id"]]
  attempts = [len(client.get(f"/api/prod/{run}").json()["attempts"]) for run in killed]
  assert max(attempts) >= 2 and min(attempts) == 1
