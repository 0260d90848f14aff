"""The demonstration root: what it holds, made by the stages themselves, only shorter."""

from rich.console import Console
from starlette.testclient import TestClient

from nmoe.records import goodput
from nmoe.records.live import Live
from stages.demo import make, questions
from stages.report.html import write_report
from stages.viz.server import Server


def test_the_demonstration_has_an_ablation_a_sweep_and_a_run_whose_rank_was_killed(tmp_path):
  root = tmp_path / "root"
  make(root, Console(quiet=True), steps=12, seeds=1, points=3)
  client = TestClient(Server(Live(root, tmp_path / "cache")).app(), base_url="http://127.0.0.1")

  def ask(path, **query):
    return client.get(f"/api/{path}", params=query).json()

  seen = ask("runs")
  stages = {e["stage"]: e["id"] for e in seen["experiments"]}
  assert stages.keys() == {"ablate", "proxy", "prod"}
  ablation = ask(f"experiment/{stages['ablate']}")
  assert [arm["name"] for arm in ablation["arms"]] == ["baseline", "variant"]
  assert ablation["report"] and ablation["verdict"] == "inconclusive", "of one seed"
  sides = dict(zip("ab", (arm["runs"][0]["id"] for arm in ablation["arms"]), strict=True))
  own = [row[0] for row in ask("compare", **sides)["changes"]["rows"]]
  assert [key for key in own if not key.startswith("experiment.")] == ["moe.bias_update_rate"]
  flips = ask("flips", **sides)
  assert flips["suite"] == "sentences" and flips["tasks"][0]["documents"] >= 20
  run = ask(f"run/{sides['a']}")
  assert run["experts"] == ["count", "bias", "gate", "source code", "source prose"]
  map_of = client.get(f"/api/experts?run={sides['a']}&layer=0&of=bias")
  assert map_of.content.count(b'"experts": 16') == 1
  sweep = ask(f"sweep/{stages['proxy']}")
  assert {line["panel"] for line in sweep["lines"]} == {"joint", "off"}
  assert all(len(line["points"]) == 3 for line in sweep["lines"])
  (made,) = [r["id"] for r in seen["runs"] if r["experiment"] == stages["prod"]]
  production = ask(f"prod/{made}")
  kinds = [event["kind"] for event in production["events"]]
  assert (production["status"], kinds) == (
    "completed",
    ["override", "launch", "restart", "permanent"],
  )
  without = production["events"][0]["detail"]["without"]
  assert without["balance"].startswith("is inconclusive"), "of one seed; else it would be cited"
  assert len(production["starts"]) == 1 and production["starts"][0]["step"] >= 2
  page = write_report(root, stages["prod"]).read_text(encoding="utf-8")
  seen = goodput.production(root, made)
  assert f"<b>{seen.goodput:.1%}</b>goodput" in page and "<td>restart</td>" in page
  assert all(f"{bucket}, {seen.seconds[bucket]:,.1f} s" in page for bucket in spent(seen))
  told = {name: getattr(seen, name) for name in ("seconds", "goodput", "ettr", "wall_s", "step")}
  assert {name: production[name] for name in told} == told, "the page tells what the report tells"
  assert client.get(f"/api/ranks?run={made}").content.count(b'"ranks": 2') == 1


def spent(seen: goodput.Production) -> set[str]:
  return {span.bucket for span in seen.spans}


def test_questions_have_their_own_end_and_another_one_s(tmp_path):
  lines = questions(tmp_path / "q.jsonl").read_text().splitlines()
  assert len(lines) >= 20 and len({line for line in lines}) == len(lines)
