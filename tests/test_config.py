"""Configs: found by name, composed, and mistakes told in a sentence that lists what exists."""

import pytest

from boltznce import UserError, config, load_system


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small set of configs of its own, so that this test knows every name in it."""
    files = {
        "train.yaml": "defaults: [{method: one}, {budget: smoke}, _self_]\nseed: 0\n",
        "method/one.yaml": "rate: 1\n",
        "method/two.yaml": "rate: 2\n",
        "budget/smoke.yaml": "steps: 3\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(config, "config_dir", lambda: tmp_path)
    return tmp_path


def test_shipped_systems_are_listed():
    assert {"aldp", "aldp_amber96"} <= set(config.available("system"))
    assert config.available("no such group") == []


def test_unknown_system_lists_what_exists():
    with pytest.raises(UserError, match=r"nope.*aldp, aldp_amber96"):
        load_system("nope")


def test_every_shipped_system_loads():
    for name in config.available("system"):
        assert load_system(name).name == name


def test_overrides_and_paths(tmp_path):
    assert load_system("aldp", temperature=310).temperature == 310.0
    path = tmp_path / "mine.yaml"
    path.write_text((config.config_dir() / "system" / "aldp.yaml").read_text().replace("name: aldp", "name: mine"))
    assert load_system(path).name == load_system(str(path)).name == "mine"


def test_unknown_setting_lists_the_settings():
    with pytest.raises(UserError, match=r"colour.*forcefield, temperature"):
        load_system("aldp", colour="red")


def test_compose(folder):
    composed = config.compose("train", ["method=two", "seed=7"])
    assert composed == {"method": {"rate": 2}, "budget": {"steps": 3}, "seed": 7}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=three"], "Unknown method 'three': choose one of one, two"),
        (["budget=huge"], "Unknown budget 'huge': choose one of smoke"),
        (["sed=1"], "sed"),
        (["seed=[1"], r"seed=\[1"),
    ],
)
def test_mistakes_on_the_command_line(folder, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        config.compose("train", overrides)
    assert "\n" not in str(caught.value)


def test_unknown_config(folder):
    with pytest.raises(UserError, match="choose one of train"):
        config.compose("trian")
