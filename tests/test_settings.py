"""Settings: every problem at once, with file, dotted key and remedy; files in the repository are valid."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbio import settings
from fedbio.encoder_names import DEFAULT_ENCODER
from fedbio.errors import SettingsError
from fedbio.settings_parts import TEXT_FORMS

ROOT = Path(__file__).parent.parent


def problems_of(tmp_path: Path, text: str, model: type = settings.RunSettings, overrides: tuple[str, ...] = ()) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings.load(path, model, list(overrides))
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{path}", "config.yaml")


def test_load_reports_all_problems_at_once_with_dotted_keys(tmp_path: Path) -> None:
    text = "datset: demo\nsites: {count: many}\ntraining:\n  rounds: 0\n  sedes: [1]\n  mlps: ['32', 7x]\n"
    assert problems_of(tmp_path, text).splitlines() == [
        "config.yaml: sites.count: expected an integer, found 'many'",
        "config.yaml: training.mlps.1: expected one to eight layer widths joined by hyphens, for example 256-128-64",
        "config.yaml: training.rounds: expected a number >= 1, found 0",
        "config.yaml: training.sedes: unknown key; did you mean 'seeds'?",
        "config.yaml: datset: unknown key; did you mean 'dataset'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: ../else",
            "config.yaml: run: expected letters, digits, _, dots and -, a letter or digit first, at most 63, "
            "found '../else'",
        ),
        ("report: {map: perhaps}", "config.yaml: report.map: expected true or false, found 'perhaps'"),
        ("training: 5", "config.yaml: training: expected further keys, found 5"),
        ("encoder: {long: fold}", "config.yaml: encoder.long: expected 'cut' or 'window', found 'fold'"),
        ("training: {seeds: [1, 1]}", "config.yaml: training.seeds: 1 named twice; name each once"),
        ("federation: {min_sites: 4}", "config.yaml: federation.min_sites is 4, but sites.count is only 3"),
        (
            "aggregation: file\nquantization: int8",
            "config.yaml: quantization.to_sites is int8, but with aggregation file the server holds no model that it "
            "could quantize; set it to null",
        ),
        ("- a list", "config.yaml: expected keys and values, found ['a list']"),
        (
            "run: one\nrun: two",
            "config.yaml:2: not valid YAML: key 'run' is there twice; check the indentation and quotes",
        ),
    ],
)
def test_load_names_key_found_and_allowed(tmp_path: Path, text: str, message: str) -> None:
    assert problems_of(tmp_path, text) == message


def test_load_names_the_line_of_broken_yaml(tmp_path: Path) -> None:
    message = problems_of(tmp_path, "run: demo\nsites: {count: 3\n")
    assert message.startswith("config.yaml:3: not valid YAML: ")


def test_load_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: there is no such settings file; check the path"):
        settings.load(tmp_path / "nowhere.yaml", settings.RunSettings)


def test_jobs_file_suggests_keys_of_the_chosen_workflow(tmp_path: Path) -> None:
    text = "jobs:\n  - {workflow: embed, encodr: {}}\n  - {workflow: clasify}\n"
    assert problems_of(tmp_path, text, settings.JobsFile).splitlines() == [
        "config.yaml: jobs.0.encodr: unknown key; did you mean 'encoder'?",
        "config.yaml: jobs.1: expected 'workflow' to be one of 'embed', 'classify', 'projection', 'fedavg', 'cyclic', "
        "'evaluation', 'swarm', 'split', 'statistics', 'custom', found 'clasify'; did you mean 'classify'?",
    ]


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("nf5", "quantization.to_sites: expected 'float16', 'bfloat16', 'int8', 'fp4' or 'nf4', found 'nf5'"),
        ("{to_site: nf4}", "quantization.to_site: unknown key; did you mean 'to_sites'?"),
        ("{error_feedback: true}", "quantization: error_feedback needs a scheme in to_sites or to_server"),
    ],
)
def test_quantization_that_makes_no_sense_is_refused(tmp_path: Path, quantization: str, message: str) -> None:
    text = f"jobs:\n  - {{workflow: classify, quantization: {quantization}}}\n"
    assert f"config.yaml: jobs.0.{message}" in problems_of(tmp_path, text, settings.JobsFile).splitlines()


def test_one_scheme_means_both_ways() -> None:
    both = {"to_sites": "int8", "to_server": "int8", "error_feedback": False}
    assert settings.ClassifyJob(workflow="classify", quantization="int8").quantization.model_dump() == both
    run = settings.RunSettings(quantization={"to_server": "nf4", "error_feedback": True})
    job = run.jobs().jobs[1]
    assert isinstance(job, settings.ClassifyJob)
    assert job.quantization == settings.Quantization(to_server="nf4", error_feedback=True)


@pytest.mark.parametrize(
    ("job", "rest", "message"),
    [
        ("aggregate: krum, byzantine: 2, sites_per_round: 6", "", "sites_per_round is 6, and krum with byzantine 2"),
        ("aggregate: trimmed_mean, sites_per_round: 2", "", "sites_per_round is 2, and trimmed_mean with trim 0.2"),
        ("aggregate: krum", "federation: {min_sites: 4}", "federation.min_sites is 4, and krum with byzantine 1"),
        ("aggregate: trimmed_mean", "federation: {min_sites: 2}", "job fedavg needs 3 updates in a round"),
        ("aggregate: krum", "sites: [a, b, c, d]", "the number of sites is 4"),
    ],
)
def test_rule_that_would_get_too_few_updates_is_refused(tmp_path: Path, job: str, rest: str, message: str) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(f"jobs:\n- {{workflow: fedavg, client: {{script: train.py}}, {job}}}\n{rest}\n")
    with pytest.raises(SettingsError, match=message):
        settings.load(path, settings.JobsFile)


def test_rule_that_gets_just_enough_updates_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    job = "{workflow: fedavg, client: {script: train.py}, aggregate: krum, byzantine: 2, sites_per_round: 7}"
    path.write_text(f"jobs:\n- {job}\nfederation: {{min_sites: 7}}\nsites: [a, b, c, d, e, f, g]\n")
    assert settings.load(path, settings.JobsFile).jobs[0].least_updates[0] == 7


def test_limits_of_a_run_are_those_of_its_server(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("transport: {window_chunks: 32, max_peers: 3}\n")
    found = settings.load(path, settings.RunSettings).jobs().transport
    assert (found.window_chunks, found.max_peers, found.resume_s) == (32, 3, 120.0)
    problem = problems_of(tmp_path, "transport: {window_chunks: 0, resume_m: 2}")
    assert problem.splitlines() == [
        "config.yaml: transport.window_chunks: expected a number >= 1, found 0",
        "config.yaml: transport.resume_m: unknown key; did you mean 'resume_s'?",
    ]


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {rounds: 5, batch_size: 8}\n")
    loaded = settings.load(
        path, settings.RunSettings, ["training.rounds=7", "training.learning_rate=1e-2", "dataset=a.csv.gz"]
    )
    assert (loaded.training.rounds, loaded.training.batch_size, loaded.training.learning_rate) == (7, 8, 0.01)
    assert loaded.run_name == "a"


@pytest.mark.parametrize("override", ["training.rounds", "=3", "dataset.name=3", "run={"])
def test_overrides_that_make_no_sense_are_refused(tmp_path: Path, override: str) -> None:
    problems_of(tmp_path, "dataset: demo", overrides=(override,))


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("config.yaml", "config"),
        ("site.yaml", "site"),
        ("server.yaml", "server"),
        ("embeddings.yaml", "embeddings"),
        ("encoder.yaml", "encoder"),
        ("federation.yaml", "federation"),
        ("jobs/classify.yaml", "jobs"),
    ],
)
def test_settings_in_the_repository_are_valid(file: str, kind: str) -> None:
    settings.load(ROOT / "config" / file, settings.FILES[kind])


def test_settings_in_the_repository_name_the_default_encoder_and_the_features_that_validation_prefers() -> None:
    read = [yaml.safe_load((ROOT / "config" / file).read_text()) for file in ("config.yaml", "embeddings.yaml")]
    read += yaml.safe_load((ROOT / "config" / "jobs" / "classify.yaml").read_text())["jobs"][:1]
    for each in read:
        assert (each["encoder"]["name"], each["encoder"]["pooling"]) == (DEFAULT_ENCODER, "ends")


@pytest.mark.parametrize("kind", settings.FILES)
def test_schemas_in_the_repository_are_those_of_the_types(kind: str) -> None:
    path = ROOT / "workflow" / "schemas" / f"{kind}.schema.json"
    assert json.loads(path.read_text()) == settings.FILES[kind].model_json_schema(), (
        f"run: fedbio settings schema {kind} -o {path.relative_to(ROOT)}"
    )


def test_every_setting_says_what_it_means() -> None:
    for kind in ("config", "site", "server", "embeddings", "jobs"):
        schema = settings.FILES[kind].model_json_schema()
        for name, model in {"": schema, **schema.get("$defs", {})}.items():
            for key, value in model["properties"].items():
                described = "description" in value or "$ref" in value or "const" in value or key in {"jobs", "name"}
                assert described, f"{kind}: {name}.{key} has no description"


def test_hidden_layers_are_read_from_their_name() -> None:
    assert settings.parse_hidden("256-128-64") == (256, 128, 64)
    for wrong in ("", "0", "12-", "a-b", "1.5", "-3", "9" * 9, "-".join("9" * 9)):
        with pytest.raises(ValueError, match="expected one to eight layer widths"):
            settings.parse_hidden(wrong)


@pytest.mark.parametrize(
    ("pooling", "mlps", "message"),
    [
        ("mean", ["la9-32"], r"job classify: light attention \(la9-32\) reads one embedding per residue"),
        ("residues", ["32"], "job classify: the MLP 32 reads one embedding per protein"),
        (
            "residues",
            ["la9-32", "32"],
            "mlps: light attention reads one embedding per residue and MLPs one per protein",
        ),
    ],
)
def test_jobs_whose_classifiers_cannot_read_the_embeddings_are_refused(
    tmp_path: Path, pooling: str, mlps: list[str], message: str
) -> None:
    jobs = [
        {"workflow": "embed", "encoder": {"pooling": pooling}},
        {"workflow": "classify", "training": {"mlps": mlps}},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    with pytest.raises(SettingsError, match=message):
        settings.load(tmp_path / "jobs.json", settings.JobsFile)


FEDAVG = """
[[jobs]]
workflow = "fedavg"
rounds = 3
client = { script = "train.py", initial = "train.py:net" }

[federation]
min_sites = 2
"""


@pytest.mark.parametrize("ending", ["toml", "json", "yaml"])
def test_job_file_says_the_same_in_every_form(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"jobs.{ending}"
    # JSON is YAML
    path.write_text(FEDAVG if ending == "toml" else json.dumps(tomllib.loads(FEDAVG)))
    found = settings.load(path, settings.JobsFile)
    [job] = found.jobs
    assert (job.workflow, job.name, job.client.script) == ("fedavg", "fedavg", "train.py")
    assert found.federation.min_sites == 2


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        ("toml", "[[jobs]]\nworkflow = fedavg\n", r"jobs.toml: not valid TOML: .*line 2.*check the quotes"),
        ("toml", FEDAVG.replace("rounds", "round"), r"jobs.toml: jobs.0.*round: .*did you mean 'rounds'"),
        ("toml", FEDAVG + "min_sites = 3\n", "jobs.toml: not valid TOML"),
        ("json", '{"jobs": [}', r"jobs.json:1: not valid JSON: .*check commas and quotes"),
        ("json", '{"jobs": [], "jobs": []}', "key 'jobs' is there twice"),
    ],
)
def test_job_file_that_cannot_be_read_is_said_where(tmp_path: Path, ending: str, content: str, message: str) -> None:
    path = tmp_path / f"jobs.{ending}"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        settings.load(path, settings.JobsFile)


@pytest.mark.parametrize("kind", settings.FILES)
def test_every_form_of_text_is_told_in_words(kind: str) -> None:
    def patterns(part: Any) -> Iterator[str]:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from patterns(value)
        if isinstance(part, dict) and isinstance(part.get("pattern"), str):
            yield part["pattern"]

    found = set(patterns(settings.FILES[kind].model_json_schema()))
    assert found <= TEXT_FORMS.keys()
