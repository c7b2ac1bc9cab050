"""The benchmarks' summaries, what reads them, and the measurement of one build beside another."""

import copy
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest

import dynquant

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def _package():
    """`bench` by its path: the checkout on sys.path would hide the dynquant that is tested."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])


_package()
from bench import against, chart, cli, compare, markdown, summary  # noqa: E402


def entry(name, seconds, numpy_seconds=2e-3, isa="avx2"):
    ratios = {"numpy": numpy_seconds / seconds, "ort": 3.0, "ort_bound": 1.25}
    return {
        "name": name,
        "what": f"what {name} does",
        "group": "operations",
        "layer": None,
        "activations": None,
        "threads": 1,
        "level": "l2",
        "seconds": {isa: seconds, "numpy": numpy_seconds},
        "isas": {isa: {"ratios": ratios, "limit": 0.5}},
    }


def made(*cases):
    return {
        "schema": summary.SCHEMA,
        "date": "2026-01-31",
        "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"dynquant": "1", "numpy": "2"},
        "limits": {"divides": 1e9},
        "avx512": False,
        "rounds": 15,
        "cases": list(cases),
    }


@pytest.fixture
def saved(tmp_path):
    """Saves a summary, and returns its path."""

    def save(found):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        summary.write(found, path)
        return str(path)

    return save


def test_a_summary_is_read_as_it_was_written(tmp_path):
    found = made(entry("a", 1e-3), entry("b", 0.00123))
    summary.write(found, tmp_path / "new folder" / "s.json")
    assert summary.read(tmp_path / "new folder" / "s.json") == summary._rounded(found)


def test_a_summary_has_a_line_for_each_case():
    assert len(summary.dumps(made(*(entry(str(i), 1e-3) for i in range(100)))).splitlines()) == 111


def test_measurements_are_rounded_to_four_digits():
    assert summary._rounded({"a": [1.23456e-7, 98765.4], "b": (7, "x", None)}) == {
        "a": [1.235e-7, 98770.0],
        "b": [7, "x", None],
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 3}', '{"schema": 3, "cases": [{}]}']
)
def test_what_is_no_summary_is_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(summary.SummaryError, match=r"s\.json"):
        summary.read(tmp_path / "s.json")


def test_a_case_without_a_key_is_refused(saved):
    case = entry("a", 1e-3)
    del case["isas"]
    with pytest.raises(summary.SummaryError, match=r"no cases\.isas"):
        summary.read(pathlib.Path(saved(made(case))))


def test_the_hardest_way_of_a_library_counts():
    ratios = {"ort": 3.0, "ort_bound": 1.25, "torch": 1.5, "torch_f32": 1.0}
    assert summary.hardest(ratios, "ONNX Runtime") == 1.25
    assert summary.hardest(ratios, "PyTorch") == 1.5
    assert summary.hardest(ratios, "NumPy") is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_saved_results_are_summaries_with_a_chart(path):
    found = summary.read(path)
    assert path.with_suffix(".svg").read_text() == chart.svg(found)


def test_saved_results_are_small():
    assert RESULTS
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "bench" / "results").iterdir()) < 1000


def test_a_chart_has_a_dot_for_each_library_at_its_hardest_ratio():
    found = made(entry("a", 1e-3), entry("<b>", 1e-3))
    root = xml.etree.ElementTree.fromstring(chart.svg(found))
    circles = root.findall("{*}circle")
    # Two in the legend, two a case.
    assert len(circles) == 6
    assert circles[2].get("cx") != circles[3].get("cx")
    assert "what <b> does" in [text.text for text in root.findall("{*}text")]


def test_a_table_shows_the_hardest_ratio_of_each_run():
    lines = markdown.table(
        [made(entry("a", 1e-3)), made(entry("a", 5e-4), entry("b", 1e-3))], "a"
    ).splitlines()
    assert lines[2:] == ["| what a does | 2.0 |  | 1.2 | 4.0 |  | 1.2 |"]


# ----------------------------------------------------------------------------------------------------------
# compare


def test_the_same_run_is_not_slower(saved, capsys):
    path = saved(made(entry("a", 1e-3), entry("b", 2e-3)))
    assert cli.main(["compare", path, path, "--threshold", "0.1"]) == 0
    assert capsys.readouterr().out == "0 of 2 slower by more than 0.1 %\n"


@pytest.mark.parametrize(("threshold", "status"), [(4, 1), (6, 0)])
def test_the_threshold_decides(saved, threshold, status):
    old, new = (
        saved(made(entry("a", 1e-3), entry("b", 1e-3))),
        saved(made(entry("a", 1.05e-3), entry("b", 1e-3))),
    )
    assert cli.main(["compare", old, new, "--threshold", str(threshold)]) == status
    assert cli.main(["compare", new, old, "--threshold", str(threshold)]) == 0


def test_a_machine_that_is_slower_for_numpy_too_is_no_change(saved):
    old, new = saved(made(entry("a", 1e-3, 2e-3))), saved(made(entry("a", 2e-3, 4e-3)))
    assert cli.main(["compare", old, new]) == 0
    assert cli.main(["compare", old, new, "--by", "time"]) == 1


def test_what_changed_is_listed_slowest_first():
    old = made(entry("a", 1e-3), entry("b", 1e-3), entry("c", 1e-3), entry("gone", 1e-3))
    new = copy.deepcopy(made(entry("a", 1.5e-3), entry("b", 2e-3), entry("c", 0.5e-3), entry("added", 1e-3)))
    new["versions"]["numpy"] = "3"
    found = compare.changes(old, new, "numpy")
    assert {change.name: change.speedup for change in found} == pytest.approx({"a": 2 / 3, "b": 0.5, "c": 2})
    lines = compare.report(old, new, found, 10).splitlines()
    assert lines[0].startswith("note: versions differ")
    assert [line.split() for line in lines[2:5]] == [
        ["b", "avx2", "0.50x"],
        ["a", "avx2", "0.67x"],
        ["c", "avx2", "2.00x"],
    ]
    assert lines[-1] == "2 of 3 slower by more than 10 %"


def test_wrong_usage_has_a_status_of_its_own(saved, capsys):
    path, other = saved(made(entry("a", 1e-3))), saved(made(entry("a", 1e-3, isa="amx")))
    assert cli.main(["compare", path, other]) == 2
    assert cli.main(["compare", path, "missing.json"]) == 2
    assert "missing.json" in capsys.readouterr().err
    for arguments in ([path], [path, path, "--threshold", "0"], [path, path, "--by", "mood"]):
        with pytest.raises(SystemExit) as error:
            cli.main(["compare", *arguments])
        assert error.value.code == 2


# ----------------------------------------------------------------------------------------------------------
# Programs


def run(*arguments, path=None):
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_every_command_has_help():
    for command in ([], *([name] for name in cli.COMMANDS)):
        done = run(*command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {' '.join([cli.PROGRAM, *command])}")


def test_a_run_is_saved_and_compared(tmp_path):
    out = tmp_path / "s.json"
    done = run(
        "--quick",
        "--cases",
        "^int8_tensor_64$|_384x1536_m1_down$",
        "--rounds",
        1,
        "--out",
        out,
        path=INSTALLED,
    )
    assert done.returncode == 0, done.stderr
    found = summary.read(out)
    assert [case["name"] for case in found["cases"]] == [
        "int8_tensor_64",
        *(f"linear_{kind}_384x1536_m1_down" for kind in ("w8a8", "w4a8_g32", "w4a8_g128")),
    ]
    assert [case["activations"] for case in found["cases"]] == [None, "down", "down", "down"]
    assert out.with_suffix(".svg").exists()
    assert cli.main(["compare", str(out), str(out)]) == 0


INSTALLED = pathlib.Path(dynquant.__file__).parent.parent


@pytest.fixture(scope="module")
def slow_build(tmp_path_factory):
    """A copy of the package whose per-tensor quantizing computes for a millisecond more."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(INSTALLED / "dynquant", folder / "dynquant", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "dynquant" / "__init__.py", "a", encoding="utf-8") as file:
        file.write(
            "\n\ndef dynamic_quantize_int8(*args, _real=dynamic_quantize_int8, **options):\n"
            "    sum(range(100_000))\n"
            "    return _real(*args, **options)\n"
        )
    return folder


@pytest.mark.parametrize(("slow_is_new", "status"), [(True, 1), (False, 0)])
def test_two_builds_run_side_by_side(slow_build, slow_is_new, status):
    new, old = (slow_build, INSTALLED) if slow_is_new else (INSTALLED, slow_build)
    case = ("--cases", "^int8_tensor_64$", "--rounds", 3, "--threshold", 100)
    done = run("--against", old, *case, path=new)
    assert done.returncode == status, done.stdout + done.stderr
    assert f"from {new}" in done.stdout.splitlines()[0]
    assert f"from {old}" in done.stdout.splitlines()[1]
    assert f"{status} of 1 slower by more than 100 %" in done.stdout


def test_a_build_is_slower_only_where_all_of_the_interval_is():
    noisy = against.Result(old=[1.0] * 100, new=[0.7] * 45 + [1.5] * 55)
    assert noisy.speedup == pytest.approx(1 / 1.5)
    assert noisy.interval == pytest.approx((1 / 1.5, 1 / 0.7))
    assert not noisy.is_slower(3)
    steady = against.Result(old=[1.0] * 100, new=[1.02] * 30 + [1.05] * 70)
    assert steady.interval == pytest.approx((1 / 1.05, 1 / 1.05))
    assert steady.is_slower(3)
    assert not steady.is_slower(6)
    assert against.Result(old=[2.0, 1.0, 1.0], new=[1.0, 1.0, 2.0]).interval == (0.5, 2.0)


@pytest.mark.parametrize("folder", [ROOT / "tests", INSTALLED])
def test_no_other_build_is_wrong_usage(folder):
    done = run("--against", folder, path=INSTALLED)
    assert done.returncode == 2
    assert "--against" in done.stderr
