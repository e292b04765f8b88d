"""The command `edge-llm report`: what it makes of a log, whatever is in it, on a terminal and as a page."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import cli, report
from edge_daemon.logger import COLUMNS, CsvLog
from tests.fakes import FakeClock

ROOT = Path(__file__).parent.parent
SECOND = 10**9
HOSTILE = "<script>alert(1)</script>&\x1b[2J$x^2$\u202e"


def task(**cells: Any) -> dict[str, Any]:
    """A task row."""
    plain = {"record": "task", "status": "succeeded", "model_name": "small", "priority": "normal", "src": "door7"}
    return {**plain, "task_latency_ns": 3 * SECOND, "queue_wait_ns": SECOND, **cells}


def load(**cells: Any) -> dict[str, Any]:
    """The row of a load."""
    return {
        "record": "model",
        "status": "loaded",
        "model_name": "small",
        "model_switching_time_ns": 10 * SECOND,
        **cells,
    }


def sample(**cells: Any) -> dict[str, Any]:
    """A telemetry row."""
    return {"record": "telemetry", "memory_usage_percent": 50, "temperature_c": 60.5, **cells}


class Log:
    """A log whose rows are a minute apart, from 2026-01-01 on."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "llm_metrics.csv"
        self.clock = FakeClock(wall_s=1_767_225_600.0)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> "Log":
        """Append rows."""
        log = CsvLog(self.path, rotate_bytes=65_536, keep=100, text="full", clock=self.clock)
        for row in rows:
            log.append([row])
            self.clock.advance(60)
        log.close()
        return self


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """An empty log."""
    return Log(tmp_path)


def told(log: Log, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    assert cli.main(["report", "--csv", str(log.path), *arguments]) == 0
    return capsys.readouterr().out


def cells(page: str, title: str, name: str) -> list[str]:
    """The figures of a row of a table on a terminal."""
    table = page.split(f"\n{title}:\n")[1].split("\n\n", maxsplit=1)[0]
    (line,) = (line for line in table.splitlines() if line.split()[:1] == [name])
    return line.split()[1:]


# -- what it tells ---------------------------------------------------------------------------------------------------


def test_tables(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """States, priorities, models, types, failures, devices and the board, each with its own figures."""
    rows = [
        *(task(tokens_per_second=speed, eval_count=10, task_type="count") for speed in (4, 6, 8)),
        task(status="failed", error_code="no_memory", priority="urgent", queue_wait_ns=90 * SECOND, src="pump"),
        task(status="expired", priority="urgent", queue_wait_ns=30 * SECOND, model_name="large"),
        load(),
        load(evicted_models=["large"], model_switching_time_ns=20 * SECOND),
        load(status="load_failed"),
        load(status="unloaded"),
        sample(throttled=["under_voltage"], memory_available_bytes=2_000_000_000),
        sample(temperature_c=81, memory_usage_percent=None),
    ]
    page = told(log.write(rows), capsys)
    assert "11 rows, 2026-01-01 00:00 to 2026-01-01 00:10 UTC" in page
    assert cells(page, "Tasks", "succeeded") == ["3", "60.0", "%"]
    assert cells(page, "Waiting", "normal") == ["3", *("1", "s") * 3, *("3", "s") * 2]
    assert cells(page, "Waiting", "urgent")[:5] == ["2", "30", "s", "90", "s"]
    assert cells(page, "Models", "small") == ["4", "3", "6.0", "30", "2", "1", "1", "10", "s", "30", "s"]
    assert cells(page, "Models", "large")[:2] == ["1", "0"]
    assert cells(page, "Task types", "count")[:2] == ["3", "3"]
    assert cells(page, "Failures", "no_memory") == ["1"]
    assert cells(page, "Devices", "pump")[:2] == ["1", "0"]
    assert cells(page, "Board", "temperature,") == ["°C", "60.5", "60.5", "81.0"]
    assert "memory available, MB" in page
    assert "samples that were: under_voltage" in page


def test_what_nobody_wanted_any_more_has_not_failed(
    log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cancelled and expired tasks are states, and no failures: neither in the table nor in the colours of the plot."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "page.html"
    page = told(log.write([task(), task(status="cancelled"), task(status="expired")]), capsys, "--html", str(file))
    assert cells(page, "Tasks", "cancelled")[0] == cells(page, "Tasks", "expired")[0] == "1"
    assert "Failures" not in page
    summary = report.read(log.path)
    assert [*summary.tasks.values["withdrawn"]] == [0, 1, 1]
    plot = file.read_text(encoding="utf-8").split("<svg")[1]
    assert "cancelled, expired" in plot
    assert "var(--bad)" not in plot


def test_what_is_not_in_the_log_is_told(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever looks for refused tasks learns on the terminal and on the page that they have no row."""
    file = tmp_path / "page.html"
    assert report.REFUSED in told(log.write([task()]), capsys, "--html", str(file))
    assert report.REFUSED in file.read_text(encoding="utf-8")


def test_older_files_count(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """What was rotated away is read as well."""
    log.write(task(result="x" * 1000) for _ in range(200))
    assert len(list(log.path.parent.iterdir())) > 2
    page = told(log, capsys)
    assert "older files: 200 rows" in page
    assert cells(page, "Tasks", "succeeded")[0] == "200"


@pytest.mark.parametrize(
    ("since", "left"), [("2026-01-01T00:05", 5), ("2026-01-01T01:05:00+01:00", 5), ("2025-12-31", 10)]
)
def test_since(since: str, left: int, log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """Only rows from that time on count."""
    log.write(task() for _ in range(10))
    assert cells(told(log, capsys, "--since", since), "Tasks", "succeeded")[0] == str(left)


def test_since_so_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes, hours, days and weeks back from now."""
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert [report.since(text) for text in ("5m", "2h", "1d", "1w")] == [999_700, 992_800, 913_600, 395_200]


@pytest.mark.parametrize("text", ["yesterday", "7", "7x", "2026-13-01", ""])
def test_a_wrong_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with 2 and says what a time looks like."""
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "--since", text])
    assert end.value.code == 2
    assert "2026-01-31" in capsys.readouterr().err


def test_the_configured_log(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --csv it is the daemon's own."""
    log.write([task()])
    config = tmp_path / "config.yaml"
    config.write_text(f"data_dir: {tmp_path}\n", encoding="utf-8")
    assert cli.main(["report", "--config", str(config)]) == 0
    assert str(log.path) in capsys.readouterr().out


def test_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a missing file nor a missing folder is more than one line."""
    for path in (tmp_path / "none.csv", tmp_path / "none" / "none.csv"):
        assert cli.main(["report", "--csv", str(path)]) == 1
        error = capsys.readouterr().err
        assert str(path.parent) in error
        assert error.count("\n") == 1


def test_an_empty_log(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A header alone is a log of no rows, and makes a page."""
    log.path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    page = tmp_path / "page.html"
    assert "0 rows" in told(log, capsys, "--html", str(page))
    assert page.exists()


# -- what it survives ------------------------------------------------------------------------------------------------


def test_what_is_torn_or_foreign_is_skipped_and_counted(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a row, senseless cells, other people's files: all the rest is told."""
    log.write([task(), task()])
    whole = log.path.read_text(encoding="utf-8")
    row = whole.splitlines()[1]
    broken = [row.replace("2026-01-01", "yesterday"), row.replace(",task,", ",gossip,"), "a,b", row[:40]]
    log.path.write_text(whole + "\n".join(broken), encoding="utf-8")
    log.path.with_name("llm_metrics.7.csv").write_text("timestamp,task_type\n1,2\n", encoding="utf-8")
    log.path.with_name("llm_metrics.8.csv").write_bytes(b"")
    log.path.with_name("llm_metrics.9.csv").write_bytes(bytes(range(256)) * 600)
    page = told(log, capsys)
    assert cells(page, "Tasks", "succeeded")[0] == "2"
    assert "3 files skipped" in page
    assert f"{len(broken)} rows skipped" in page or f"{len(broken) + 1} rows skipped" in page


def test_an_open_quote_costs_no_more_than_what_it_swallows(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell without an end is given up at csv's limit, and reading goes on behind it."""
    log.write([task()])
    row = log.path.read_text(encoding="utf-8").splitlines()[1]
    with log.path.open("a", encoding="utf-8") as file:
        file.write(f'"{row}\n' + f"{row}\n" * 2000)
    assert int(cells(told(log, capsys), "Tasks", "succeeded")[0].replace(",", "")) > 500


@pytest.mark.parametrize("figure", ["nan", "inf", "1e999", "-", "0x10", "\uff11\uff12", "9" * 400])
def test_senseless_figures(figure: str, log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell that is no number, or a mad one, is none."""
    columns = ("queue_wait_ns", "task_latency_ns", "tokens_per_second", "eval_count")
    log.write([task(**dict.fromkeys(columns, figure)), task(), sample(temperature_c=figure)])
    assert cells(told(log, capsys, "--html", str(tmp_path / "page.html")), "Tasks", "succeeded")[0] == "2"


def test_a_log_of_an_older_version(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns that it lacks are empty, columns of a later one are ignored."""
    header = "timestamp,record,status,model_name,something_new\n"
    log.path.write_text(f"{header}2026-01-01T00:00:00.000Z,task,succeeded,small,x\n", encoding="utf-8")
    assert cells(told(log, capsys), "Models", "small")[:2] == ["1", "1"]


def test_the_clock_was_not_set(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 1970 count, but no plot goes back to 1970 for them."""
    log.write([task(timestamp="1970-01-01T00:00:01.000Z", clock_synced=False), task()])
    page = tmp_path / "page.html"
    assert "In no plot: 1 row from before the clock was set." in told(log, capsys, "--html", str(page))
    assert "1970" not in page.read_text(encoding="utf-8").split("<svg", 1)[1]


def test_a_log_of_a_moment(log: Log, tmp_path: Path) -> None:
    """Its plots show minutes, not years."""
    page = tmp_path / "page.html"
    log.write([task(), sample()])
    assert cli.main(["report", "--csv", str(log.path), "--html", str(page)]) == 0
    plots = page.read_text(encoding="utf-8").split("<svg")[1:]
    assert len(plots) == 4
    for plot in plots:
        assert ">2027<" not in plot
        assert ">2026-Jan-01 00:0" in plot


def test_the_clock_was_never_known_to_be_right(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with chrony in the sandbox as shipped: the plots are drawn none the less, with a word on it."""
    log.write([task(clock_synced=False), sample(clock_synced=False)])
    page = tmp_path / "page.html"
    assert "The clock was never known to be right" in told(log, capsys, "--html", str(page))
    assert page.read_text(encoding="utf-8").count("<svg") == 4


def test_what_was_measured_counts_whatever_the_clock(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample's temperature is right at any time."""
    page = told(log.write([sample(clock_synced=False, temperature_c=20.5), sample(temperature_c=70.5)]), capsys)
    (line,) = (line for line in page.splitlines() if "temperature" in line)
    assert line.split()[-3] == "20.5"
    assert line.split()[-1] == "70.5"


def test_many_names(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """However many devices there are, the table has an end."""
    log.write(task(src=f"device-{n}") for n in range(40))
    page = told(log, capsys)
    assert page.count("  device-") == report.TOP
    assert f"and {40 - report.TOP} more" in page


def test_long_names_stay_apart(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """They differ at their ends, so that is where they are not cut."""
    long = "registry.example/organisation/a-model-with-a-very-long-name-"
    page = told(log.write(task(model_name=f"{long}{n}:latest") for n in range(3)), capsys)
    for n in range(3):
        assert f"-with-a-very-long-name-{n}:latest " in page


def test_a_script_that_our_font_lacks(log: Log, tmp_path: Path) -> None:
    """Its names stay text in the plots, for the font of the browser; nothing is said of it."""
    log.write([task(model_name="模型", tokens_per_second=4)])
    page = tmp_path / "page.html"
    assert cli.main(["report", "--csv", str(log.path), "--html", str(page)]) == 0
    assert "模型</text>" in page.read_text(encoding="utf-8")


def test_no_control_character_reaches_the_terminal(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from outside."""
    page = told(log.write([task(src=HOSTILE, task_type=HOSTILE, model_name=HOSTILE)]), capsys)
    assert page.replace("\n", "").isprintable()
    assert r"\x1b" in page


def test_a_reader_that_has_seen_enough(log: Log) -> None:
    """`| head` ends it without a traceback."""
    log.write(task(src=f"device-{n}") for n in range(20))
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "edge_daemon", "report", "--csv", str(log.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


# -- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of one."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        """Take note of text."""
        self.text += data


@pytest.fixture
def page(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Page:
    """The page of a log in which a device tries everything."""
    pytest.importorskip("matplotlib")
    names = dict.fromkeys(
        ("src", "task_type", "model_name", "error_code", "status", "priority", "prompt", "result"), HOSTILE
    )
    log.write(
        [task(**names, tokens_per_second=5), load(model_name=HOSTILE), task(), sample(throttled=[HOSTILE]), sample()]
    )
    file = tmp_path / "page.html"
    told(log, capsys, "--html", str(file))
    return Page(file.read_text(encoding="utf-8"))


def test_nothing_on_the_page_runs(page: Page) -> None:
    """What looks like a script is text, and nothing else is allowed to run."""
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ("http-equiv", "Content-Security-Policy") in page.attributes


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    """No picture, font or style is fetched."""
    assert not {"img", "link", "iframe", "object", "embed", "image"} & {*page.tags}
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert [source for source in sources if not source.startswith("#")] == []
    assert "url(http" not in page.text
    assert "@import" not in page.text


def test_every_plot_has_a_title_and_the_colours_of_the_page(page: Page) -> None:
    """Tasks, waits, speeds, loads, memory, temperature."""
    titles = [value for name, value in page.attributes if name == "aria-label"]
    assert len(titles) == page.tags.count("svg") == 6
    for title in titles:
        assert title in page.text
    styles = " ".join(value for name, value in page.attributes if name == "style")
    assert "var(--ink)" in styles
    assert "#12345" not in styles
    assert "width: 100%" in page.text


def test_without_matplotlib(log: Log, tmp_path: Path) -> None:
    """The tables are there, and the page says what to install."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError", encoding="utf-8")
    file = tmp_path / "page.html"
    log.write([task()])
    done = subprocess.run(
        [sys.executable, "-m", "edge_daemon", "report", "--csv", str(log.path), "--html", str(file)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert "apt install python3-matplotlib" in done.stdout
    page = Page(file.read_text(encoding="utf-8"))
    assert "apt install python3-matplotlib" in page.text
    assert "svg" not in page.tags
    assert "table" in page.tags


def test_a_page_that_cannot_be_written(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which and why."""
    log.write([task()])
    assert cli.main(["report", "--csv", str(log.path), "--html", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"edge-llm: {tmp_path}: Is a directory\n"


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.25, "250 ms"), (1, "1 s"), (12.34, "12.3 s"), (120, "2 min"), (7200, "2 h"), (864_000, "10 d")],
)
def test_durations(seconds: float, text: str) -> None:
    """Three digits and the unit that suits."""
    assert report.duration(seconds) == text


def test_quantiles() -> None:
    """Of the values themselves, the ends included."""
    assert [report.quantile([1, 2, 3, 4, 5], share) for share in (0, 0.5, 0.95, 1)] == [1, 3, 5, 5]
    assert report.quantile([7], 0.95) == 7
