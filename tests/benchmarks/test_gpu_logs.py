"""What the GPU command reads in the logs of its stages."""

import json

from gpu_stages import LOG, row, stage

from benchmarks import gpu, gpu_logs, gpu_tests
from benchmarks.gpu_logs import (
    read_build,
    read_cases,
    read_rows,
    read_sanitizer,
    read_tests,
)
from benchmarks.gpu_report import markdown

PROFILE = """==PROF== Connected to process 411 (/usr/bin/python3.12)
==PROF== Profiling "stream_statistics" - 0: 0%....50%....100% - 5 passes
a line of the program
==PROF== Disconnected from process 411
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
""".replace("\\\n", "")


def profile_lines(kernel, number, **values):
    names = {column: name for name, (column, _) in gpu_logs.METRICS.items()}
    about = f'"{number}","411","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)"'
    return "".join(
        f'{about},"(2048, 1, 1)","0","9.0","Command line profiler metrics","{names[c]}","%","{v}"\n'
        for c, v in values.items()
    )


def test_peers_that_are_absent_are_in_the_report():
    text = "trl-1.16.0-py3-none-any.whl is unpacked\nverl is left out: it is not installed\n"
    found = gpu_logs.read_peers(text)
    assert found["unpacked"] == ["trl-1.16.0-py3-none-any.whl"] and "problem" not in found
    result = {"stage": "peers", "status": "passed", "seconds": 1.0, "note": "", **found}
    assert "- verl is left out: it is not installed" in markdown([result], "2026-01-01")


def test_a_profile_is_a_table_of_kernels():
    first = {"ms": "1,234,567", "DRAM %": "91.25", "issue %": "40.5", "occupancy %": "74.9"}
    text = PROFILE + profile_lines("stream_statistics<1, 2>(Problem)", 0, **first, registers="40")
    text += profile_lines("resident_loss", 1, ms="250000", registers="64")
    found = gpu_logs.read_profile(text)
    assert "problem" not in found and len(found["profile"]) == 2
    result = {"stage": "profile-cuda", "status": "passed", "seconds": 9.0, "note": "", **found}
    said = markdown([result], "2026-01-01")
    assert "| cuda | stream_statistics<1, 2> | 1.23 | 91.2 | 40.5 | 74.9 | 40 |" in said
    assert "| cuda | resident_loss | 0.25 | - | - | - | 64 |" in said
    assert gpu_logs.read_profile(PROFILE)["problem"] == "no kernel was profiled"
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters"
    assert gpu_logs.read_profile(refused)["refused"].startswith("ERR_NVGPUCTRPERM")


def test_failures_of_one_test_are_one_line():
    lines = [f"FAILED tests/test_a.py::test_two[{i}] - x" for i in range(3)]
    others = ["FAILED tests/test_a.py::test_other - y"]
    found = read_tests("\n".join([LOG.splitlines()[0], *lines, *others]))["failures"]
    assert found == [f"{lines[0]} (and 2 more)", *others]


def test_what_the_smoke_checks_found_is_kept():
    text = (
        "ok     triton certain rows, T=0.7: H 1e-7\nFAILED triton graph: no\n2 checks, 1 failed\n"
    )
    found = gpu_logs.read_smoke(text)
    assert found["problem"] == "1 of 2 checks failed" and len(found["said"]) == 2
    assert "problem" not in gpu_logs.read_smoke("ok     cuda x: 1\n1 checks, 0 failed\n")


def test_tests_are_counted_even_if_pytest_was_stopped():
    found = read_tests(LOG)
    assert found["counts"] == {"FAILED": 1, "PASSED": 2, "SKIPPED": 1}
    assert found["failures"] == ["FAILED tests/test_a.py::test_two - AssertionError: 3 PASSED"]
    assert found["skipped_because"] == ["SKIPPED [1] tests/test_b.py:7: needs trl"]
    assert read_tests(LOG[:150])["counts"] == {"FAILED": 1, "PASSED": 1}
    alone = "tests/test_a.py::test_one PASSED   [ 50%]\ntests/test_a.py::test_two FAILED [100%]\n"
    assert read_tests(alone)["counts"] == {"FAILED": 1, "PASSED": 1}
    assert read_tests("ModuleNotFoundError: No module named 'pytest'")["problem"]


def test_a_real_pytest_log_is_understood(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    tests = "def test_good(): pass\n\ndef test_bad(): assert 0\n"
    (tmp_path / "tests/test_small.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")  # as in this repository
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 1)
    made = stage("tests", read=read_tests)._replace(command=gpu_tests.command("tests"))
    (result,) = gpu.run_all([made], tmp_path / "out", 600)
    assert result["note"] == "exit code 1"
    assert result["counts"] == {"FAILED": 1, "PASSED": 1}
    assert result["failures"][0].startswith("FAILED tests/test_small.py::test_bad")


def test_a_build_without_the_compiled_part_is_a_problem():
    assert read_build("building 'em_kernels._C' extension\n") == {}
    warning = "em_kernels: WARNING: installing without the compiled CPU kernels: no compiler"
    assert read_build(f"running build_ext\n{warning}\n")["problem"].endswith("no compiler")

    other = warning.replace("compiled CPU", "CUDA").replace("compiler", "nvcc")
    assert read_build(f"{warning}\n{other}\n")["problem"].count("installing without") == 2


CASES = """\
ok     stats-bfloat16-plain: error 1.2e-07
FAILED loss-float32-cluster: error 0.3, at most 1e-5
"""


def test_cases_are_counted_and_must_come_to_an_end():
    good = CASES.splitlines()[0]
    assert read_cases(f"{good}\n1 cases, 0 failed\n") == {"cases": 1, "failed_cases": []}
    assert read_cases(f"{good}\n")["problem"] == "the cases did not come to an end"
    found = read_cases(f"{CASES}2 cases, 1 failed\n")
    assert found["problem"] == "1 of 2 cases failed"
    assert found["failed_cases"] == ["loss-float32-cluster: error 0.3, at most 1e-5"]


def test_a_sanitizer_must_have_run_the_cases_and_found_nothing():
    good = CASES.splitlines()[0] + "\n1 cases, 0 failed\n"
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert read_sanitizer(good + clean)["summary"].startswith("0 hazards")
    assert read_sanitizer(clean)["problem"] == "the cases did not come to an end"
    assert read_sanitizer(good)["problem"] == "compute-sanitizer gave no summary"
    assert read_sanitizer(f"{good}========= ERROR SUMMARY: 2 errors\n")["problem"] == "2 errors"
    hazard = clean.replace("0 hazards displayed (0", "1 hazard displayed (1")
    assert read_sanitizer(good + hazard)["problem"].startswith("1 hazard ")


def test_rows_are_read_up_to_where_the_stage_was_stopped():
    text = f"| a | table |\n{json.dumps(row())}\n{json.dumps(row(n=9))[:-20]}"
    assert read_rows(text)["rows"] == [row()]
    text = f"{json.dumps(row())}\nverl is left out: No module named 'verl'\n"
    assert read_rows(text)["left_out"] == {"verl": "No module named 'verl'"}
    assert read_rows("Traceback")["problem"] == "nothing was measured"


def test_of_the_rows_of_one_implementation_the_last_counts():
    early, late = row(samples=1, seconds=0.02), row(samples=9)
    text = "\n".join(map(json.dumps, [early, row(implementation="TRL", samples=1), late]))
    assert read_rows(text)["rows"] == [late, row(implementation="TRL", samples=1)]


def test_a_floor_alone_is_no_measurement_and_a_wrong_result_is_said():
    floor = row(implementation="copy of the logits", error=None)
    assert read_rows(json.dumps(floor))["problem"] == "nothing was measured"
    wrong = row(implementation="em_kernels cuda", seconds=None, failure="wrong")
    text = "\n".join(map(json.dumps, [floor, wrong]))
    assert read_rows(text)["problem"] == "em_kernels cuda: wrong"
    peer = row(implementation="Liger", seconds=None, failure="out of memory")
    assert "problem" not in read_rows("\n".join(map(json.dumps, [row(), peer])))
