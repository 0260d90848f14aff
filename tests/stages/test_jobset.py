"""The generated JobSet against strict schemas, and its creation by the real kubectl.

Needs `pip install 'nmoe[test,prod-test]'`. Not run anywhere here: the JobSet's controller.
"""

import asyncio
import copy
import io
import json
import shutil
import threading
from pathlib import Path

import jsonschema
import kmock
import kubernetes_validate
import pytest
from labs import write_variant
from rich.console import Console

from nmoe.errors import RunError
from nmoe.records.root import Root
from stages.launch import jobset
from stages.prod import launching

pytestmark = pytest.mark.kubernetes
DATA = Path(__file__).parents[1] / "data"
VERSION = "1.37"
IMAGE = "registry.example/nmoe@sha256:" + "0" * 64
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


class Emulator:
  """An API server in memory, on loopback, in a thread; a context. It validates nothing."""

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
    async with kmock.KubernetesEmulator() as api, kmock.Server(api) as server:
      info = kmock.ResourceInfo(kind="JobSet", singular="jobset", namespaced=True)
      info.verbs.update(("create", "get", "list", "delete"))
      api.resources["jobset.x-k8s.io/v1alpha2/jobsets"] = info
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
    wrapper.write_text(f'#!/bin/sh\nverb=$1; shift\nexec {real} "$verb" --validate=false "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield api


def test_kubectl_creates_it_once(kubectl):
  jobset.create(DATA / "jobset.json")
  with pytest.raises(RunError, match=r"(?s)kubectl refused .*already exists"):
    jobset.create(DATA / "jobset.json")


def test_a_second_launch_is_refused(lab, kubectl):
  """The name is the run's: the API server itself says no."""
  file, out = write_variant(lab.file, "jobset", BODY), io.StringIO()
  assert launching.launch(file, Console(file=out), "a test") == 0
  assert "created:" in out.getvalue()
  with pytest.raises(RunError, match=r"(?s)already exists"):
    launching.launch(file, Console(file=out), "a test")
  (run,) = (path.name for path in (lab.root / "runs").iterdir())
  made = json.loads((Root(lab.root).prod(run) / "jobset.json").read_text())
  check(made)
