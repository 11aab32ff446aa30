"""A site and its training script: real processes and sockets, and what happens when the script does wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedbio.errors import DataError, FedbioError, FederationError, ProtocolError, RefusedError, ScriptError
from fedbio.executors import deployed, registry
from fedbio.executors.script import Deploy, InitializeScript, Scripts, count_examples
from fedbio.federation import FLModel, ParamsType, Task
from fedbio.federation.policy import ANY, Policy
from fedbio.federation.workflows.study import meta

from .conftest import LOOP, ScriptSite, alive, make_context, wait_until

ADD_ONE = (
    LOOP
    + """
    params = {name: value + 1 for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, metrics={"loss": 0.5}))
"""
)

ONES = FLModel(params={"w": np.ones(4, np.float32)})

BOTH = pytest.mark.parametrize("launch", ["process", "in_process"])


def pid_of(site: ScriptSite, name: str = "pid") -> int:
    """The process id that a script has written into its folder."""
    path = site.files / name
    wait_until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


@BOTH
def test_script_trains_round_after_round_and_ends(site: ScriptSite, launch: str) -> None:
    site.deploy(ADD_ONE, launch=launch)
    model = FLModel(params={"layers.0": np.arange(6, dtype=np.float32).reshape(2, 3)})
    for number in range(3):
        answer = site.train(FLModel(params=model.params, current_round=number, total_rounds=3))
        np.testing.assert_array_equal(answer.params["layers.0"], model.params["layers.0"] + 1)
        assert answer.metrics == {"loss": 0.5}
        assert answer.meta == {"weight": 30}
        assert (answer.current_round, answer.total_rounds) == (number, 3)
        model = answer
    measured = site.evaluate(model)
    assert (measured.metrics, measured.params) == ({"loss": 0.5}, {})
    site.end()


@BOTH
def test_script_knows_site_job_and_task(site: ScriptSite, launch: str) -> None:
    script = LOOP + (
        "    info = flare.system_info()\n"
        "    assert (flare.get_site_name(), flare.get_job_id()) == ('site-1', 'job-1')\n"
        f"    assert info['data'] == {str(site.context.data)!r}\n"
        f"    assert info['workspace'] == {str(site.files)!r}\n"
        "    assert (model.current_round, model.total_rounds, model.meta) == (3, 7, {'proximal_mu': 0.1})\n"
        "    kinds = (flare.is_train(), flare.is_evaluate(), flare.is_submit_model())\n"
        "    params = {'task': np.array(kinds)}\n"
        "    flare.send(flare.FLModel(params=params, metrics={flare.get_task_name(): 1}))\n"
    )
    site.deploy(script, launch=launch)
    model = FLModel(params=ONES.params, current_round=3, total_rounds=7, meta={"proximal_mu": 0.1})
    assert site.train(model).params["task"].tolist() == [True, False, False]
    assert site.evaluate(model).metrics == {"evaluate": 1.0}


def test_submitted_model_comes_with_its_params(site: ScriptSite) -> None:
    site.deploy(LOOP + "    flare.send(flare.FLModel(params={'own': np.arange(3.0)}, metrics={'best': 0.9}))\n")
    answer = site.submit()
    assert answer.params["own"].tolist() == [0.0, 1.0, 2.0]
    assert answer.metrics == {"best": 0.9}


@pytest.mark.parametrize(
    ("meta_of_script", "weight"), [("{}", 30), ("{'NUM_STEPS_CURRENT_ROUND': 12}", 12), ("{'weight': 7.5}", 7.5)]
)
def test_weight_is_what_the_script_says_else_what_the_site_registered(
    site: ScriptSite, meta_of_script: str, weight: float
) -> None:
    site.deploy(
        LOOP + f"    flare.send(flare.FLModel(params_type='DIFF', params=model.params, meta={meta_of_script}))\n"
    )
    answer = site.train(ONES)
    assert answer.weight == weight
    assert answer.params_type is ParamsType.DIFF


def test_script_weighs_no_more_than_its_site_has_registered(site: ScriptSite, caplog: pytest.LogCaptureFixture) -> None:
    site.deploy(
        LOOP + "    flare.send(flare.FLModel(params=model.params, meta={'NUM_STEPS_CURRENT_ROUND': 31}))\n",
        launch="in_process",
    )
    assert [site.train(ONES).weight for _ in range(2)] == [30, 30]
    (said,) = [each.getMessage() for each in caplog.records if "weigh" in each.getMessage()]
    assert "claims a weight of 31" in said
    assert "registered 30 examples" in said
    assert "set `examples:` in its settings" in said


def test_state_of_an_optimizer_stays_at_the_site(site: ScriptSite, caplog: pytest.LogCaptureFixture) -> None:
    site.deploy(
        LOOP + "    flare.send(flare.FLModel(params=model.params, optimizer_params={'momentum': np.ones(2)}))\n",
        launch="in_process",
    )
    for _ in range(2):
        answer = site.train(ONES)
        assert (set(answer.params), answer.optimizer_params) == ({"w"}, {})
    assert len([each for each in caplog.records if "optimizer_params stay at this site" in each.getMessage()]) == 1


@BOTH
def test_metrics_are_seen_before_the_answer(site: ScriptSite, launch: str) -> None:
    script = LOOP + (
        "    for step in range(3):\n"
        "        flare.log('loss', np.float32(step / 2), 'SCALAR', global_step=step)\n"
        "    flare.log('both', {'a': 1, 'b': 2}, 'SCALARS')\n"
        "    flare.log('words', 'a protein of ours', 'TEXT')\n"
        "    flare.send(flare.FLModel(params=model.params))\n"
    )
    site.deploy(script, launch=launch)
    site.train(ONES)
    wait_until(lambda: len(site.metrics) == 5)
    assert sorted(site.metrics, key=str) == [
        ("job-1", "both/a", 1.0, None),
        ("job-1", "both/b", 2.0, None),
        ("job-1", "loss", 0.0, 0),
        ("job-1", "loss", 0.5, 1),
        ("job-1", "loss", 1.0, 2),
    ]


@BOTH
def test_initial_model_is_that_of_the_function(site: ScriptSite, launch: str) -> None:
    script = """
        import numpy as np
        from shape import SHAPE

        def make():
            return {"layer": {"weight": np.full(SHAPE, 2.0, np.float32)}, "count": 3}

        if __name__ == "__main__":
            raise SystemExit("not to be run")
    """
    site.deploy(script, files={"shape.py": "SHAPE = (2, 2)\n"}, initial="train.py:make", launch=launch)
    params = site.initialize().params
    assert params["layer.weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert params["count"].item() == 3


@BOTH
def test_missing_function_of_the_initial_model_is_said_once_with_those_that_there_are(
    site: ScriptSite, launch: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
        from collections import OrderedDict

        class Net: ...

        def make(): ...

        def _helper(): ...
    """
    site.deploy(script, initial="train.py:made", launch=launch)
    with pytest.raises(FederationError, match=r": client\.initial: train\.py has no function made; it has Net, make$"):
        site.initialize()
    assert "Traceback" not in site.log + caplog.text
    assert "has no function" not in caplog.text


@BOTH
def test_script_that_trains_while_it_is_imported_is_told_so(site: ScriptSite, launch: str) -> None:
    site.deploy(ADD_ONE, initial="train.py:make", launch=launch)
    with pytest.raises(FederationError, match=r'put what trains under if __name__ == "__main__"'):
        site.initialize()


@BOTH
def test_crash_is_the_tasks_failure_with_the_exceptions_last_line(
    site: ScriptSite, launch: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = LOOP + (
        "    print('protein MKV is on its way', flush=True)\n"
        "    if model.current_round == 1:\n"
        "        raise ValueError('the learning rate is no number' + 1000 * '!')\n"
        "    flare.send(flare.FLModel(params=model.params))\n"
    )
    site.deploy(script, launch=launch)
    site.train(ONES)
    with pytest.raises(FederationError, match=r"exit code 1.*: ValueError: the learning rate is no number") as caught:
        site.train(FLModel(params=ONES.params, current_round=1))
    # what may leave of it: one line, cut short, and nothing of what the script has printed
    assert len(str(caught.value)) < 450
    assert "MKV" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "raise ValueError" in caplog.text
    # the next task starts it anew
    assert site.train(FLModel(params=ONES.params, current_round=2)).params.keys() == {"w"}


@BOTH
def test_last_lines_of_a_crash_reach_the_server_if_the_operator_lets_them(site: ScriptSite, launch: str) -> None:
    site.context = dataclasses.replace(site.context, policy=Policy(code=frozenset({ANY}), last_lines=3))
    lines = "    for number in range(9): print('protein', number, 400 * '!', flush=True)\n"
    site.deploy(LOOP + lines + "    raise ValueError('the learning rate is no number')\n", launch=launch)
    with pytest.raises(ScriptError) as caught:
        site.train(ONES)
    assert str(caught.value) == (
        "the script ended with exit code 1 before it had answered: ValueError: the learning rate is no number; "
        "the site's log has its last lines"
    )
    assert len(caught.value.last_lines) == 3
    assert caught.value.last_lines[-1] == "ValueError: the learning rate is no number"
    assert all(len(line) <= 300 for line in caught.value.last_lines)


def test_script_that_python_cannot_read_is_the_tasks_failure(site: ScriptSite) -> None:
    site.deploy("import fedbio.client as flare\nflare.init(\n")
    with pytest.raises(FederationError, match=r"exit code 1 .*: SyntaxError: '\(' was never closed"):
        site.train(ONES)


@BOTH
def test_early_exit_is_the_tasks_failure(site: ScriptSite, launch: str) -> None:
    site.deploy(LOOP + "    raise SystemExit(3)\n", launch=launch)
    with pytest.raises(FederationError, match="ended with exit code 3 before it had answered"):
        site.train(ONES)


@BOTH
def test_script_that_never_asks_for_a_model_is_told_so(site: ScriptSite, launch: str) -> None:
    site.deploy("print('hello')\n", launch=launch)
    with pytest.raises(FederationError, match="without having asked for a model"):
        site.train(ONES)


@BOTH
def test_script_of_one_round_is_started_for_each(site: ScriptSite, launch: str) -> None:
    script = """
        import fedbio.client as flare
        flare.init()
        model = flare.receive()
        flare.send(flare.FLModel(params={"w": model.params["w"] * 2}))
        print("done with one")
    """
    site.deploy(script, launch=launch)
    model = ONES
    for _ in range(3):
        model = site.train(model)
    assert model.params["w"].tolist() == [8.0] * 4


def test_crash_between_two_tasks_costs_none_of_them(site: ScriptSite, caplog: pytest.LogCaptureFixture) -> None:
    site.deploy(LOOP + "    flare.send(flare.FLModel(params=model.params))\n    raise OSError('after the answer')\n")
    for _ in range(2):
        assert site.train(ONES).params["w"].tolist() == [1.0] * 4
        conversation = site.scripts.of("job-1", site.context)._current
        assert conversation is not None
        wait_until(conversation.has_ended)
    assert "after the answer" in caplog.text


@pytest.mark.slow
@BOTH
def test_hang_is_ended_after_the_idle_time(site: ScriptSite, launch: str) -> None:
    script = LOOP + (
        "    import os, pathlib, time\n"
        "    pathlib.Path(flare.system_info()['workspace'], 'pid').write_text(str(os.getpid()))\n"
        "    if model.current_round == 0:\n"
        "        time.sleep(6 if 'in_process' in str(model.meta) else 1000)\n"
        "    flare.send(flare.FLModel(params=model.params))\n"
    )
    site.deploy(script, launch=launch, idle_s=3.0)
    with pytest.raises(FederationError, match="has not answered within 3 s"):
        site.train(FLModel(params=ONES.params, meta={"launch": launch}))
    if launch == "process":
        assert not alive(pid_of(site))
    assert site.train(FLModel(params=ONES.params, current_round=1)).params.keys() == {"w"}


@pytest.mark.slow
def test_script_that_ignores_signals_is_killed(site: ScriptSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "GIVE_UP_S", 0.5)
    script = LOOP + (
        "    import os, pathlib, signal, time\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    pathlib.Path(flare.system_info()['workspace'], 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
    )
    site.deploy(script, idle_s=3.0)
    with pytest.raises(FederationError, match="has not answered"):
        site.train(ONES)
    assert not alive(pid_of(site))


@pytest.mark.parametrize("victim", ["script", "guard"])
def test_script_that_is_killed_is_the_tasks_failure(site: ScriptSite, victim: str) -> None:
    script = LOOP + (
        "    import os, pathlib, subprocess, sys, time\n"
        "    folder = pathlib.Path(flare.system_info()['workspace'])\n"
        "    if model.current_round == 0:\n"
        "        child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "        (folder / 'child').write_text(str(child.pid))\n"
        "        (folder / 'pid').write_text(str(os.getpid()))\n"
        "        time.sleep(1000)\n"
        "    flare.send(flare.FLModel(params=model.params))\n"
    )
    site.deploy(script)
    killer = threading.Thread(target=lambda: os.kill(_victim(site, victim), signal.SIGKILL))
    killer.start()
    with pytest.raises(FederationError, match="was killed by SIGKILL"):
        site.train(ONES)
    killer.join()
    wait_until(lambda: not alive(pid_of(site)))
    if victim == "script":
        # also what it has started, in a session of its own
        wait_until(lambda: not alive(pid_of(site, "child")))
    else:
        # nobody is left who could have ended it
        os.kill(pid_of(site, "child"), signal.SIGKILL)
    assert site.train(FLModel(params=ONES.params, current_round=1)).params.keys() == {"w"}


def _victim(site: ScriptSite, which: str) -> int:
    script = pid_of(site)
    if which == "script":
        return script
    return int(Path(f"/proc/{script}/stat").read_text().rpartition(")")[2].split()[1])


SITE = """
import pathlib, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from client.conftest import ScriptSite, make_context
from fedbio.federation import FLModel

site = ScriptSite(make_context(pathlib.Path(sys.argv[2])))
site.deploy(pathlib.Path(sys.argv[3]).read_text())
site.train(FLModel(params={"w": np.ones(3)}))
"""


def test_site_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    script = LOOP + (
        "    import os, pathlib, signal, subprocess, time\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    folder = pathlib.Path(flare.system_info()['workspace'])\n"
        "    child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "    (folder / 'child').write_text(str(child.pid))\n"
        "    (folder / 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
    )
    (tmp_path / "script.txt").write_text(script)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", SITE, str(Path(__file__).parents[1]), str(tmp_path), str(tmp_path / "script.txt")]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)})
    files = tmp_path / "workspace/scripts/job-1/files"
    wait_until(lambda: (files / "pid").exists() and (files / "pid").read_text() != "", within_s=60)
    started = [int((files / name).read_text()) for name in ("pid", "child")]
    assert all(map(alive, started))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, started)))
    wait_until(lambda: not list(temporary.iterdir()))


@BOTH
def test_end_lets_the_script_finish_its_own_way(site: ScriptSite, launch: str) -> None:
    script = ADD_ONE + "import pathlib\npathlib.Path(flare.system_info()['workspace'], 'finished').write_text('yes')\n"
    site.deploy(script, launch=launch)
    site.train(ONES)
    site.end()
    assert (site.files / "finished").read_text() == "yes"
    with pytest.raises(FederationError, match="has to be deployed first"):
        site.train(ONES)


def test_site_that_comes_back_takes_its_script_up(site: ScriptSite) -> None:
    site.deploy(ADD_ONE)
    site.train(ONES)
    Deploy(site.scripts).close()
    again = ScriptSite(site.context)
    assert again.train(ONES).params["w"].tolist() == [2.0] * 4
    Deploy(again.scripts).close()
    # but not what its operator does not let run any more
    site.context.policy = Policy()
    with pytest.raises(RefusedError, match="does not let"):
        ScriptSite(site.context).train(ONES)


def test_end_kills_a_script_that_does_not_end(site: ScriptSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "POLITE_S", 0.5)
    monkeypatch.setattr(deployed, "FIRM_S", 0.5)
    script = ADD_ONE + (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(flare.system_info()['workspace'], 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(1000)\n"
    )
    site.deploy(script)
    site.train(ONES)
    threading.Thread(target=lambda: pid_of(site)).start()
    site.end()
    assert not alive(pid_of(site))


def test_job_that_is_abandoned_ends_the_script_in_the_middle_of_a_task(site: ScriptSite) -> None:
    script = LOOP + (
        "    import os, pathlib, time\n"
        "    pathlib.Path(flare.system_info()['workspace'], 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
    )
    site.deploy(script)
    started = time.monotonic()

    def abandon() -> None:
        pid_of(site)
        Deploy(site.scripts).abandon("job-1")

    thread = threading.Thread(target=abandon)
    thread.start()
    with pytest.raises(FederationError, match="was stopped"):
        site.train(ONES)
    thread.join()
    assert not alive(pid_of(site))
    assert time.monotonic() - started < 50


def test_deploying_the_same_files_again_leaves_the_script_running(site: ScriptSite) -> None:
    script = LOOP + "    import os\n    flare.send(flare.FLModel(params={'pid': np.array(os.getpid())}))\n"
    site.deploy(script)
    first = site.train(ONES).params["pid"].item()
    site.deploy(script)
    assert site.train(ONES).params["pid"].item() == first
    site.deploy(script + "# changed\n")
    assert site.train(ONES).params["pid"].item() != first


def test_model_of_100_mb_goes_through_unchanged(site: ScriptSite) -> None:
    site.deploy(LOOP + "    flare.send(flare.FLModel(params={**model.params, 'one': np.ones(1)}))\n")
    random = np.random.default_rng(0)
    params = {f"layer.{number}": random.normal(size=(1280, 10_000)).astype(np.float32) for number in range(2)}
    answer = site.train(FLModel(params=params))
    for name, value in params.items():
        np.testing.assert_array_equal(answer.params[name], value)


def test_code_that_the_operator_did_not_allow_does_not_run(site: ScriptSite) -> None:
    site.context.policy = Policy(code=frozenset({"0" * 64}))
    with pytest.raises(RefusedError, match=r"does not let train\.py \(SHA-256 [0-9a-f]{64}\) run"):
        site.deploy(ADD_ONE)
    with pytest.raises(FederationError, match="has to be deployed first"):
        site.train(ONES)


def test_code_that_differs_from_the_file_that_the_operator_named_is_told_so(site: ScriptSite, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("pass\n")
    site.context.policy = Policy.read(tmp_path, workflows=None, max_rounds=None, code=["train.py"])
    with pytest.raises(RefusedError, match=r"run: its operator has named a train\.py with other content; let the"):
        site.deploy(ADD_ONE)


def test_default_site_takes_no_code() -> None:
    from fedbio.settings import SiteSettings

    executors = registry()
    assert {executors[f"client/{name}"].kind for name in ("deploy", "end")} == {"code"}
    assert "code" not in SiteSettings(party="site", kit="kit", proteins="x.fasta").allow
    assert Policy().code == frozenset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "SHA-256 .*, the server announced"),
        (lambda path: path.write_bytes(b""), "0 bytes, the server announced"),
        (lambda path: path.unlink(), "announced this file and not sent it"),
    ],
)
def test_file_that_is_not_what_was_announced_is_not_run(site: ScriptSite, change: object, message: str) -> None:
    spec = site.receive({"train.py": ADD_ONE})
    assert callable(change)
    change(site.context.received(spec.group) / "train.py")
    with pytest.raises(DataError, match=message):
        Deploy(site.scripts).execute(site.task("client/deploy"), FLModel(meta=meta(spec)), site.context)


@pytest.mark.parametrize(
    ("job", "changes"),
    [
        ("../../escape", {}),
        ("job-1", {"script": "../train.py"}),
        ("job-1", {"script": "other.py"}),
        ("job-1", {"initial": "other.py:make"}),
        ("job-1", {"processes": 0}),
    ],
)
def test_hostile_specification_is_refused(site: ScriptSite, job: str, changes: dict[str, object]) -> None:
    spec = msgspec.structs.replace(site.receive({"train.py": ADD_ONE}), **changes)
    task = msgspec.structs.replace(site.task("client/deploy"), job=job)
    with pytest.raises(ProtocolError):
        Deploy(site.scripts).execute(task, FLModel(meta=meta(spec)), site.context)


def test_file_name_that_leaves_the_folder_is_refused(site: ScriptSite) -> None:
    spec = site.receive({"train.py": ADD_ONE})
    bad = msgspec.structs.replace(spec.files[0], name="../../train.py")
    task = site.task("client/deploy")
    with pytest.raises(ProtocolError, match="plain name"):
        content = FLModel(meta=meta(msgspec.structs.replace(spec, files=(*spec.files, bad))))
        Deploy(site.scripts).execute(task, content, site.context)


def test_site_registers_its_proteins_unless_its_operator_says_otherwise(site: ScriptSite) -> None:
    site.context.data.write_text(">a\nMKV\n>b\nMKVL\n>c TARGET=Elsewhere\nMM\n")
    assert count_examples(site.context) == 30
    site.context.examples = None
    assert count_examples(site.context) == 3


def test_arguments_reach_the_script_and_those_of_another_in_this_process_do_not(site: ScriptSite) -> None:
    script = LOOP + "    import sys\n    flare.send(flare.FLModel(params=model.params, metrics={sys.argv[1]: 1}))\n"
    own = list(sys.argv)
    for launch in ("process", "in_process"):
        site.deploy(script, launch=launch, arguments=("--rate",))
        assert site.train(ONES).metrics == {"--rate": 1.0}
    site.end()
    assert sys.argv == own


def test_sites_in_one_process_have_a_script_each(site: ScriptSite, tmp_path: Path) -> None:
    script = LOOP + (
        "    import helper, time\n"
        "    time.sleep(0.2)\n"
        "    name = flare.get_site_name()\n"
        "    flare.send(flare.FLModel(params=model.params, metrics={name: helper.NUMBER}))\n"
    )
    (tmp_path / "second").mkdir()
    other = ScriptSite(make_context(tmp_path / "second"))
    other.context.site = "site-2"
    for each in (site, other):
        each.deploy(script, launch="in_process", files={"helper.py": "NUMBER = 7\n"})
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda each: each.train(ONES).metrics, (site, other)))
            assert answers == [{"site-1": 7.0}, {"site-2": 7.0}]
    other.end()
    other.context.events.close()
    site.end()
    # the next job's file of this name is another one
    site.deploy(script, launch="in_process", files={"helper.py": "NUMBER = 8\n"})
    assert site.train(ONES).metrics == {"site-1": 8.0}


def test_answer_that_cannot_travel_is_the_scripts_error(site: ScriptSite) -> None:
    site.deploy(LOOP + "    flare.send(flare.FLModel(params={'w': {1, 2}}))\n")
    with pytest.raises(FedbioError, match=r"TypeError: params\['w'\] is a set; expected a tensor"):
        site.train(ONES)


TORCHRUN = """
import os
import torch
import torch.distributed as dist
import fedbio.client as flare

if __name__ == "__main__":
    dist.init_process_group("gloo")
    flare.init()
    assert flare.get_site_name() == "site-1" and flare.system_info()["job_id"] == "job-1"
    while flare.is_running():
        model = flare.receive()
        assert flare.get_site_name() == "site-1" and flare.is_train()
        if model.current_round == 1 and dist.get_rank() == 1:
            raise ValueError("rank 1 has had enough")
        mine = model.params["w"] * (dist.get_rank() + 1)
        dist.all_reduce(mine)
        flare.send(flare.FLModel(params={"w": mine}, metrics={"ranks": dist.get_world_size()}))
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_of_torchrun_get_one_model_and_send_one(site: ScriptSite) -> None:
    site.deploy(TORCHRUN, launch="torchrun", processes=2, idle_s=120)
    answer = site.train(ONES)
    assert answer.params["w"].tolist() == [3.0] * 4
    assert answer.metrics == {"ranks": 2.0}
    assert site.train(FLModel(params=answer.params)).params["w"].tolist() == [9.0] * 4
    with pytest.raises(FederationError, match="ValueError: rank 1 has had enough"):
        site.train(FLModel(params=ONES.params, current_round=1))
    assert site.train(ONES).params["w"].tolist() == [3.0] * 4
    site.end()


def test_new_process_of_a_site_takes_up_the_script_of_the_one_before(site: ScriptSite) -> None:
    site.deploy(ADD_ONE)
    Deploy(site.scripts).close()
    site.scripts = Scripts()  # what a new process begins with
    answer = site.train(FLModel(params={"w": np.zeros(3, np.float32)}))
    assert answer.params["w"].tolist() == [1, 1, 1]
    Deploy(site.scripts).close()
    site.scripts = Scripts()
    site.context.policy = Policy()
    with pytest.raises(RefusedError, match=r"does not let train\.py"):
        site.train(FLModel(params={"w": np.zeros(3, np.float32)}))


def test_excluded_parameters_do_not_leave(site: ScriptSite) -> None:
    site.deploy(
        """
        import numpy as np
        import fedbio.client as flare

        def net():
            return {"w": np.zeros(3, np.float32), "bn.mean": np.ones(2, np.float32)}

        if __name__ == "__main__":
            flare.init()
            while flare.is_running():
                model = flare.receive()
                flare.send(flare.FLModel(params=net()))
        """,
        initial="train.py:net",
    )
    asked = FLModel(params={"w": np.zeros(3, np.float32)}, meta={"exclude": ["bn.*"]})
    assert set(site.train(asked).params) == {"w"}
    task = Task(name="client/init", model=asked, job="job-1")
    assert set(InitializeScript(site.scripts).execute(task, asked, site.context).params) == {"w"}
