"""What devices are like, what a set-up cost and what devices hold, as lines of text for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.data.tasks import FURTHER
from fedloom.run.terminal.console import further_text, human_bytes, human_seconds


def spent(results: Mapping[str, Any]) -> dict[str, str]:
    """What is told of a run beside its method's facts; nothing of what was not measured."""
    told, state, paid = {}, results.get("device_state"), results.get("setup_paid_back")
    if devices := results.get("devices"):
        told["devices"] = profiles_told(devices)
    if results["setup_bytes_up"] or results["setup_bytes_down"] or results["setup_device_seconds"]:
        traffic = f"{human_bytes(results['setup_bytes_up'])} up, {human_bytes(results['setup_bytes_down'])} down"
        work = f", {results['setup_flops']:.3g} operations" if results.get("setup_flops") else ""
        here = f", {human_seconds(results['setup_host_seconds'])} here" if results.get("setup_host_seconds") else ""
        told["set-up"] = f"{human_seconds(results['setup_device_seconds'])} of device time{here}{work}, {traffic}"
    if paid:
        when = {key: "not within this run" if paid[key] is None else f"after round {paid[key]}" for key in ("bytes_up", "device_seconds")}
        told["set-up paid for"] = f"in uploads {when['bytes_up']}, in device time {when['device_seconds']}; against plain {paid['against']}"
    final = results.get("final") or {}
    if final.get(FURTHER):
        told["test scores"] = further_text(final[FURTHER])
    own = final.get("personalising")
    if final and own is None:
        told["personalising"] = "not told: this run is of a version that did not count it"
    elif own:
        took = f"{own['flops']:.3g} operations on all devices, {human_seconds(own['device_seconds'])} on the slowest"
        told["personalising"] = f"{took}; beside the device time of the rounds" if own["flops"] else "nothing is computed for it"
    if state:
        told["kept on a device"] = (
            f"{_beside(state, 'private_bytes')} of its own tensors, {human_bytes(state['memory_bytes'])} else; "
            f"mean of {state['devices']:,} devices that keep anything"
        )
        if state["optimizer_bytes"] is not None:
            told["optimiser's state"] = _beside(state, "optimizer_bytes")
        few, whole = state["step_flops"], state["step_flops_whole"]
        if few < whole:
            told["a step"] = f"{few:.4g} operations an example, {whole:.4g} with all rows (−{1 - few / whole:.2%})"
    return told


def profiles_told(devices: Mapping[str, Any]) -> str:
    """How many devices are of which profile, and its figures; ``devices`` as a run's results have them."""
    return "; ".join(
        f"{one['devices']:,} {one['name']} ({one['flops_per_second']:.3g} FLOP/s, {8e-6 * one['upload_bytes_per_second']:.3g} Mbit/s up, "
        f"{8e-6 * one['download_bytes_per_second']:.3g} down, {human_bytes(one['memory_bytes'])} of memory)"
        for one in devices["profiles"]
    )


def _beside(state: Mapping[str, Any], key: str) -> str:
    few, whole = state[key], state[f"{key}_whole"]
    return human_bytes(few) + (f" ({human_bytes(whole)} with all rows, −{1 - few / whole:.0%})" if few < whole else "")
