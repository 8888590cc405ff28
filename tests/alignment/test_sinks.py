"""What becomes of reports: files that survive a kill and a resumption, events, text, figures."""

import io

import pytest
import torch
from torch import nn

from ghl.alignment import Monitor, sinks
from ghl.cli import main


@pytest.fixture
def reports():
    """Of four steps of two layers and one that never runs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    with Monitor(model) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            found.append(monitor.report())
    return found


def write(directory, reports, **options):
    sink = sinks.Csv(directory, **options)
    for report in reports:
        sink.add(report)
    sink.close()


def test_csv_holds_every_number(tmp_path, reports):
    write(tmp_path, reports, neurons=True)
    rows = sinks.read_csv(tmp_path / "alignment.csv")
    assert [(int(r["step"]), r["layer"]) for r in rows[:4]] == [
        (0, "0"), (0, "2"), (0, "spare"), (1, "0"),
    ]  # fmt: skip
    first, measured = rows[3], reports[1]["0"]
    for part in ("batch", "sample", "update"):
        assert float(first[f"{part}_cosine"]) == measured[part]["cosine"]
        assert float(first[f"{part}_inner"]) == measured[part]["inner"]
    assert float(first["sign_flips"]) == measured["sign_flips"]
    assert rows[2]["batch_cosine"] == ""
    assert "did not run" in rows[2]["gaps"]
    neurons = sinks.read_csv(tmp_path / "alignment_neurons.csv")
    mine = [r for r in neurons if (r["step"], r["layer"], r["part"]) == ("2", "0", "batch")]
    assert [float(r["cosine"]) for r in mine] == reports[2]["0"]["batch"]["neurons"].tolist()


def test_csv_is_continued_after_a_kill(tmp_path, reports):
    write(tmp_path / "whole", reports)
    write(tmp_path / "cut", reports[:3])
    path = tmp_path / "cut" / "alignment.csv"
    path.write_text(path.read_text()[:-20])  # the last line is half written
    write(tmp_path / "cut", reports[2:], start=2)
    assert path.read_text() == (tmp_path / "whole" / "alignment.csv").read_text()


def test_csv_keeps_what_it_had(tmp_path, reports):
    write(tmp_path / "whole", reports)
    write(tmp_path / "twice", reports[:2])
    write(tmp_path / "twice", reports[2:])
    for name in ("twice", "whole"):
        assert len(sinks.read_csv(tmp_path / name / "alignment.csv")) == 12


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    (tmp_path / "alignment.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"alignment.csv: expected the columns step, layer"):
        sinks.Csv(tmp_path)
    assert (tmp_path / "alignment.csv").read_text() == "a,b\n1,2\n"


def test_steps_may_be_counted_elsewhere(tmp_path, reports):
    sink = sinks.Csv(tmp_path)
    sink.add(reports[0], step=700)
    sink.close()
    assert {r["step"] for r in sinks.read_csv(tmp_path / "alignment.csv")} == {"700"}


def test_parquet(tmp_path, reports):
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = sinks.Parquet(tmp_path)
    for report in reports:
        sink.add(report)
    sink.close()
    found = parquet.read_table(tmp_path / "alignment.parquet").to_pylist()
    assert found == [row for report in reports for row in sinks.rows(report)]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs pyarrow"):
        sinks.Parquet(tmp_path)


def test_all_sinks_are_closed_where_one_raises(tmp_path):
    class Full(sinks.Table):
        def close(self):
            raise OSError("no space left on device")

    first, last = (sinks.Csv(tmp_path / name) for name in "ab")
    with pytest.raises(OSError, match="no space"):
        sinks.Sinks(first, Full(io.StringIO()), last).close()
    for one in (first, last):
        with pytest.raises(ValueError, match="closed file"):
            one._layers.write("")


def test_tensorboard_has_scalars_and_histograms(tmp_path, reports):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with sinks.Sinks(sinks.TensorBoard(tmp_path)) as every:
        for report in reports:
            every.add(report)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    scalars = events.Scalars("alignment/batch_cosine/0")
    assert [e.step for e in scalars] == [0, 1, 2, 3]
    assert scalars[2].value == pytest.approx(reports[2]["0"]["batch"]["cosine"])
    assert len(events.Histograms("alignment/batch_neurons/0")) == 4
    assert "alignment/batch_cosine/spare" not in events.Tags()["scalars"]


def test_tensorboard_hides_nobodys_scalars(tmp_path, reports):
    """Of a directory that others write to, or that an earlier part of the run has written to."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path), filename_suffix=".0") as writer:
        writer.add_scalar("loss", 1.0, 7)
    with sinks.Sinks(sinks.TensorBoard(tmp_path)) as every:
        every.add(reports[0])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [7]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_table_is_drawn_in_place(reports):
    for stream, overwritten in ((Terminal(), True), (io.StringIO(), False)):
        table = sinks.Table(stream)
        for report in reports[:2]:
            table.add(report)
        text = stream.getvalue()
        assert f"{reports[1]['0']['batch']['cosine']:.3f}" in text
        assert "did not run" in text
        assert ("\x1b[5F\x1b[J" in text) == overwritten


def test_align_draws_what_was_recorded(tmp_path, reports, capsys):
    write(tmp_path, reports, neurons=True)
    assert main(["align", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 3\n")
    assert f"{reports[3]['2']['update']['cosine']:.3f}" in text
    for name in ("alignment.png", "neurons.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_align_without_a_recording(tmp_path, capsys):
    assert main(["align", str(tmp_path)]) == 2
    assert "expected alignment.csv in it" in capsys.readouterr().err
    sinks.Csv(tmp_path).close()
    assert main(["align", str(tmp_path)]) == 2
    assert "no step was measured" in capsys.readouterr().err


def test_numbers_of_any_size_fit_into_the_table():
    for value, told in ((-0.1234, "-0.123"), (1234.5, "1234.500"), (3e26, "3.00e+26")):
        assert sinks.short(value) == told and len(told) < 9
