"""The commands' promises: exit codes, one-line errors, settings files."""

import importlib
from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner

from spcxr.cli import train, use
from spcxr.cli.options import recipe_options
from spcxr.config import Config, ConfigError, setting
from spcxr.errors import NothingDone, SpcxrError
from spcxr.recipes.prepare import PrepareConfig


@dataclass(frozen=True)
class Cook(Config):
    out: str = setting(help="where")
    egg_count: int = setting(2, "how many", low=1)
    crack: bool = setting(True, "crack them")
    span: tuple[float, float] = setting((0.5, 1.0), "a pair")
    style: str = setting("fried", "how", choices=("fried", "boiled"))
    from_recipe: str | None = setting(None, "whose")


def cook(arguments, raises=None):
    seen = []

    @click.command()
    @recipe_options(Cook)
    def command(config):
        seen.append(config)
        if raises:
            raise raises

    result = CliRunner().invoke(command, arguments)
    return result, seen[0] if seen else None


def test_defaults_file_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("egg_count: 5\nspan: [0.1, 0.2]\nstyle: boiled\n")
    _, config = cook(["--out", "x", "--config", str(file), "--style", "fried", "--no-crack"])
    assert config == Cook("x", 5, False, (0.1, 0.2), "fried")


def test_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("egg_cuont: 5\n")
    result, _ = cook(["--out", "x", "--config", str(file)])
    assert result.exit_code == 2
    assert "egg_cuont" in result.output
    assert "egg_count" in result.output


def test_errors_are_one_line_with_their_exit_code():
    for error, code in ((SpcxrError("a.dcm: bad; mend it"), 2), (NothingDone("none"), 1)):
        result, _ = cook(["--out", "x"], raises=error)
        assert result.exit_code == code
        assert result.output == f"error: {error}\n"


def test_places_that_cannot_be_used_are_one_line():
    for error in (
        NotADirectoryError(20, "Not a directory", "a/b"),
        PermissionError(13, "Permission denied", "a/b"),
        OSError(30, "Read-only file system", "a/b"),
        OSError(28, "No space left on device", "a/b"),
    ):
        result, _ = cook(["--out", "x"], raises=error)
        assert result.exit_code == 2
        assert result.output.startswith("error: a/b: ")
        assert result.output.count("\n") == 1


def test_numbers_keep_their_digits_and_must_be_finite():
    _, config = cook(["--out", "x", "--egg-count", "12345678901234567"])
    assert config.egg_count == 12345678901234567
    result, _ = cook(["--out", "x", "--span", "nan,1"])
    assert result.exit_code == 2
    assert "finite" in result.output


def test_ctrl_c_is_one_line_and_exit_code_130():
    result, _ = cook(["--out", "x"], raises=KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.output.startswith("error: stopped; the same command ")
    assert result.output.count("\n") == 1


def test_ctrl_c_while_a_command_still_imports_is_the_same_line(monkeypatch):
    def stopped(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("spcxr.infer.info.gather", stopped)
    monkeypatch.setattr(importlib, "import_module", stopped)
    for group, arguments in ((train, ["prepare", "a", "--out", "b"]), (use, ["info"])):
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == 130
        assert result.output.startswith("error: stopped; the same command ")
        assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "out: x\negg_count: 3\nstyle: boiled\negg_count: 5\n"),
        ("c.json", '{"egg_count": 3, "out": "x", "egg_count": 5}'),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    result, _ = cook(["--config", str(tmp_path / name)])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {tmp_path / name}: ")
    assert "'egg_count' stands twice" in result.output
    assert result.output.count("\n") == 1


def test_a_blank_path_is_refused():
    """It would be the current folder."""
    for flags, name in ((["--out", ""], "out"), (["--out", " "], "out")):
        result, _ = cook(flags)
        assert result.exit_code == 2
        assert result.output.startswith(f"error: --{name} is empty; ")
    result, _ = cook(["--out", "x", "--from-recipe", ""])
    assert result.output == "error: --from-recipe is empty; leave it out\n"


def test_a_blank_among_several_paths_is_refused():
    for sources in (("",), ("a", " ")):
        with pytest.raises(ConfigError, match=r"^sources is empty; give one"):
            PrepareConfig(sources=sources, out="s")


def test_a_range_is_said_in_words():
    result, _ = cook(["--out", "x", "--egg-count", "0"])
    assert result.output == "error: egg_count is 0; it must be at least 1\n"


def test_debug_shows_the_traceback():
    result, _ = cook(["--out", "x", "--debug"], raises=SpcxrError("bad"))
    assert "Traceback" in result.output


def test_bad_values():
    for flags in (
        ["--egg-count", "0"],
        ["--egg-count", "two"],
        ["--span", "1"],
        ["--style", "raw"],
    ):
        result, _ = cook(["--out", "x", *flags])
        assert result.exit_code == 2, result.output
        assert len(result.output.strip().splitlines()) <= 4


def test_required_is_said():
    result, _ = cook([])
    assert result.exit_code == 2
    assert "--out" in result.output


def test_unknown_command_and_version():
    assert CliRunner().invoke(train, ["bake"]).exit_code == 2
    assert "spcxr" in CliRunner().invoke(use, ["--version"]).output


def test_info_names_every_backend_and_a_reason():
    result = CliRunner().invoke(use, ["info"])
    assert result.exit_code == 0, result.output
    for word in ("reference", "native", "triton", "group_mask", "torch"):
        assert word in result.output
