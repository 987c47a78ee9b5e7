"""The command line as a whole: what it loads, and how errors leave it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import ray_moe
from ray_moe import errors
from ray_moe.cli.commands import commands
from ray_moe.cli.terminal import Interrupts, ProgressView, format_bytes, told

run = CliRunner().invoke


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_help_loads_neither_ray_nor_torch() -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('ray', 'torch', 'transformers', 'grpc', 'numpy')\n"
        "atexit.register(lambda: sys.stderr.write(','.join(name for name in heavy if name in sys.modules)))\n"
        "sys.argv = ['ray-moe', '--help']\n"
        "from ray_moe.cli.main import app\n"
        "app()\n"
    )
    result = python(code)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("serve", "generate", "status", "config", "demo"))
    assert result.stderr == ""


def test_without_the_serve_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom ray_moe.cli.main import app\napp()\n"
    result = python(code)
    assert result.returncode == 2
    assert result.stderr == (
        "error: the command line needs typer, which is not installed; run: pip install 'ray-moe[serve]'\n"
    )


def test_a_missing_module_of_our_own_is_no_missing_extra() -> None:
    result = python("import sys; sys.modules['ray_moe.config'] = None\nfrom ray_moe.cli.main import app\napp()\n")
    assert result.returncode == 1
    assert "pip install" not in result.stderr


def test_version() -> None:
    result = run(commands, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{ray_moe.__version__}\n")


def test_no_command_shows_help() -> None:
    assert "Usage" in run(commands, []).output


def test_config_shows_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_MOE__SERVER__PORT", "9000")
    result = run(commands, ["config", "--show", "--set", "experts.num_actors=3"])
    assert result.exit_code == 0
    assert "  port: 9000  # environment variable RAY_MOE__SERVER__PORT\n" in result.stdout
    assert "  num_actors: 3  # flag --set\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "--set", "server.prot=1"], "error: flag --set: there is no setting 'server.prot'; did you mean"),
        (["config", "--set", "port"], "error: --set takes KEY=VALUE"),
        (["config", "--config", "none.yaml"], "error: cannot read the configuration none.yaml: No such file"),
        (["serve"], "error: no model to serve: name a checkpoint"),
        (["serve", "m", "--port", "70000"], "error: server.port = 70000 (flag --port): should be less than"),
        (["serve", "m", "--actors", "0"], "error: experts.num_actors = 0 (flag --actors): should be greater than"),
        (["generate", "--token-ids", "one two"], "error: with --token-ids the prompt is numbers"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    result = run(commands, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidCheckpoint, 2),
        (errors.UnsupportedModel, 2),
        (errors.InsufficientResources, 2),
        (errors.NotFound, 2),
        (errors.Unavailable, 1),
        (errors.DeadlineExceeded, 1),
        (errors.ExpertFailed, 1),
    ],
)
def test_exit_codes(error: type[errors.RayMoEError], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, told(debug=False):
        raise error("what [bold]went[/bold] wrong")
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == "error: what [bold]went[/bold] wrong\n"


def test_debug_shows_where_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), told(debug=True):
        raise errors.NotFound("it")
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130() -> None:
    with pytest.raises(typer.Exit) as caught, told(debug=False):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_counts_and_the_next_ones_do_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_process_ends_no_interrupt_counts(number: signal.Signals) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Interrupts() as interrupts:
            interrupts.ignore()
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_progress_without_a_terminal_is_a_line_for_each_stage() -> None:
    console = Console(record=True, force_terminal=False, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file, ProgressView(console) as view:
        view.update("loading", 1, 4, "1 of 2 [ready]")
        view.update("loading", 2, 4)
        view.update("ready", 0, 0)
    assert console.export_text() == "  loading: 1 of 2 [ready] (25%)\n  ready\n"


def test_progress_at_a_terminal() -> None:
    console = Console(record=True, force_terminal=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file, ProgressView(console) as view:
        view.update("loading", 1, 4)
        view.update("starting", 0, 0)


def test_sizes() -> None:
    assert [format_bytes(n) for n in (0, 999, 12_345, 7_378_112, 5e12)] == [
        "0 B",
        "999 B",
        "12.3 kB",
        "7.4 MB",
        "5.0 TB",
    ]
