"""What a call has in common with the earlier ones in its run directory, beside the key: results of
all of them are reported together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_direct.comparison.measurements import Setting
from megatron_direct.data import indexed
from megatron_direct.errors import UserError
from megatron_direct.runtime import files, typed_json
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.settings import flag_name
from megatron_direct.steps.onset import Onset


def given_paths(setting: Setting) -> dict:
    """As they were given: what repeats the comparison needs them."""
    proxy, pilot = setting.proxy, setting.measure.pilot
    return {"load": str(setting.onset.checkpoint.path),
            **({} if proxy is None else {"proxy_load": str(proxy.checkpoint.path)}),
            # In the key are the states that these were.
            **({"merge_load": list(pilot.merge_load), "merge_last": pilot.merge_last}
               if pilot.at == "merged" else {}),
            "data_path": list(setting.onset.pool.prefixes),
            "valid_data_path": list(setting.onset.valid.prefixes),
            "test_data_path": list(setting.config.test_data_path)}


def paths_of_all_calls(setting: Setting, artefact: Artefact) -> dict:
    """Of this call, and the smaller model that an earlier one gave (rank 0)."""
    earlier, found = (artefact.read() or {"details": {}})["details"], given_paths(setting)
    proxy = {name: earlier[name] for name in ("proxy_load",) if name in earlier}
    return {"load": found["load"], **proxy, **found}


def require_same_names(setting: Setting, artefact: Artefact) -> None:
    """Raises UserError where results of earlier calls are under other names of the same datasets
    (rank 0)."""
    begun = artefact.read()
    assert begun is not None
    for name in ("data_path", "test_data_path"):
        now = _names(given_paths(setting)[name])
        earlier = _names(begun["details"].get(name, ())) or now
        if now != earlier:
            raise UserError(f"{flag_name(name)} gives {now}, and the results in {setting.folder} "
                            f"are of the same datasets as {earlier}: a dataset is named by the "
                            "last part of its prefix. Give prefixes that end as before (links "
                            "will do), or choose another --run-dir.")


def _names(prefixes) -> str:
    return ", ".join(indexed.prefix_names(list(prefixes)).values())


@dataclass(frozen=True)
class SmallerModel:
    """``proxy.json``: at which checkpoint the arms of a smaller model select, at all seeds."""

    load: str
    checkpoint_digest: str


def require_same_proxy(path: Path, proxy: Onset) -> None:
    """Raises UserError where an earlier call gave another (rank 0)."""
    given = SmallerModel(str(proxy.checkpoint.path), proxy.checkpoint.digest)
    if not path.is_file():
        files.write_json(path, typed_json.to_json(given))
        return
    earlier = typed_json.read_record(SmallerModel, path)
    if earlier.checkpoint_digest != given.checkpoint_digest:
        raise UserError(f"--proxy-load {given.load} is another checkpoint than {earlier.load}, at "
                        f"which arms of {path.parent} select. Give that one, or choose another "
                        "--run-dir.")
