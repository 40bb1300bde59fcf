# SPDX-License-Identifier: Apache-2.0
"""The Hub, without a network: a cache laid out as the Hub client lays it out, and a download that is observed."""

import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from eloftr_ops import EfficientLoFTR
from eloftr_ops.weights import WeightsNotFoundError, load_pretrained
from support.weights import randomise, same_weights, shard, tiny_model

NAME = "zju-community/efficientloftr"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cached(tmp_path):
    """Two commits of a repository in a Hub cache, ``main`` being the second; and their models."""
    repository = tmp_path / "models--zju-community--efficientloftr"
    models = []
    for commit, layout in zip(COMMITS, ("transformers", "eloftr_ops"), strict=True):
        models.append(tiny_model())
        randomise(models[-1], seed=len(models))
        models[-1].save_pretrained(repository / "snapshots" / commit, layout=layout)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[1])
    return tmp_path, models


def test_a_cached_repository_loads_without_a_network(cached):
    cache, models = cached
    loaded = EfficientLoFTR.from_pretrained(NAME, cache_dir=cache, local_files_only=True)
    assert same_weights(loaded, models[1])


def test_a_revision_pins_the_weights(cached):
    cache, models = cached
    loaded = load_pretrained(NAME, revision=COMMITS[0], cache_dir=str(cache), local_files_only=True)
    assert same_weights(loaded, models[0])


def test_the_offline_variable_is_heeded(cached, monkeypatch):
    cache, models = cached
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(load_pretrained(NAME, cache_dir=cache), models[1])
    with pytest.raises(WeightsNotFoundError, match="hf download zju-community/other --local-dir FOLDER"):
        load_pretrained("zju-community/other", cache_dir=cache)


def test_what_is_asked_of_the_hub(cached, monkeypatch):
    cache, models = cached
    calls = []

    def download(repository, file, **options):
        calls.append((repository, file, options))
        return str(cache / "models--zju-community--efficientloftr" / "snapshots" / COMMITS[0] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("eloftr_ops.weights.hub.can_connect", lambda endpoint: True)
    assert same_weights(load_pretrained(NAME, revision="v1"), models[0])
    options = {"cache_dir": None, "local_files_only": False}
    assert calls == [
        (NAME, "config.json", {"revision": "v1", **options}),
        (NAME, "model.safetensors", {"revision": COMMITS[0], **options}),  # of the same commit, come what may
    ]


@pytest.mark.parametrize("local_files_only", [True, False])
def test_nothing_cached_and_no_network(tmp_path, monkeypatch, local_files_only):
    if not local_files_only:

        def unreachable(*args, **options):
            raise LocalEntryNotFoundError("Name or service not known")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(WeightsNotFoundError) as caught:
        load_pretrained(NAME, cache_dir=tmp_path, local_files_only=local_files_only)
    message = str(caught.value)
    assert message.startswith(f"{NAME}: could not get config.json")
    assert f"hf download {NAME} --local-dir FOLDER" in message
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


def test_an_unknown_revision_is_named(monkeypatch):
    def unknown(*args, **options):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unknown)
    with pytest.raises(WeightsNotFoundError, match=r"at revision v9: could not get config.json.*RevisionNotFoundError"):
        load_pretrained(NAME, revision="v9")


def test_a_revision_of_something_that_has_none(tmp_path):
    tiny_model().save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"revision: expected None, since .* is no Hub repository"):
        load_pretrained(tmp_path / "folder", revision="main")


def test_without_a_connection_the_cache_is_asked_at_once(cached, monkeypatch):
    """The client of the Hub tries for half a minute; a closed port says at once that nobody answers."""
    cache, models = cached
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    started = time.monotonic()
    assert same_weights(load_pretrained(NAME, cache_dir=cache), models[1])
    with pytest.raises(WeightsNotFoundError, match="could not get config"):
        load_pretrained("runs/mine", cache_dir=cache)
    assert time.monotonic() - started < 5


def test_a_path_in_a_folder_that_exists_is_not_looked_up(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: pytest.fail("asked"))
    for name in ("runs/mine", "~nobody-of-this-name/x"):
        with pytest.raises(WeightsNotFoundError, match="check the spelling and the path"):
            load_pretrained(name)


def test_a_repository_in_shards(cached):
    cache, models = cached
    snapshot = cache / "models--zju-community--efficientloftr" / "snapshots" / COMMITS[1]
    shard(snapshot)
    loaded = load_pretrained(NAME, cache_dir=cache, local_files_only=True)
    assert same_weights(loaded, models[1])
