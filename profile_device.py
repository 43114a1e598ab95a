"""Time: latency of blocks and nets in milliseconds, on this machine, on Qualcomm AI Hub, or as published.

A latency table is plain JSON: sites {site: [ms of option 0, 1, .., None where the device cannot run it]},
rest_ms (the net without those blocks), base_ms (the whole base net, timed at once), scale (of blocks in sums,
see `whole_net`), options (class names), frame [H, W], what it was measured on, and, from AI Hub, modules
{name: its `profile_hub` result and sites}. Batch 1. Needs torch and numpy (qai_hub for AI Hub).
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import json
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

# Table 2 of the paper: Alt-0 (the NAF block) to Alt-6 on a Samsung Galaxy S24 Ultra; table 3: 177 ms.
PAPER_BLOCK_MS = (53.0, 15.0, 13.0, 19.0, 11.0, 9.0, 28.0)
PAPER_BASE_MS = 177.0
HUB_DEVICE = "Samsung Galaxy S24 Ultra"
HUB_RUNTIMES = ("tflite", "qnn_dlc", "qnn_context_binary", "onnx")
HUB_PRECISIONS = ("float", "w8a8", "w8a16")                            # weights, activations, in bits
NOTHING = {"ms": None, "reason": None, "url": None, "date": None, "layers": [],
           "peak_mb": None, "version": "", "pictures": None}           # the result of a job that failed


class HubError(Exception):
    """One line: what Qualcomm AI Hub or its client refused, and the remedy. Jobs so far are noted."""


# -------------------------------------- timing on this machine: modules, and blocks inside their net

def stamp(x):
    """The time now: a CUDA event where x lives on a GPU, the wall clock elsewhere."""
    if x.is_cuda:
        return torch.cuda.current_stream(x.device).record_event(torch.cuda.Event(enable_timing=True))
    return time.perf_counter()


def milliseconds(start, end):
    """Between two stamps."""
    if isinstance(start, float):
        return (end - start) * 1e3
    end.synchronize()
    return start.elapsed_time(end)


def keep_memory():
    """Make the C library keep freed memory: a freed block of 31 MiB raises glibc's dynamic threshold."""
    # Below it, what ran before decides whether activations are page-faulted anew: up to three times the time.
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)


def time_together(entries, device="cpu", rounds=20, warmup=3, calls=4):
    """{name: (module, shape)} -> {name: [ms, one per round]}; every round visits each module."""
    # A visit's fastest call counts, without its first, which finds cold caches. A net fills them by itself,
    # so that one call will do.
    keep_memory()
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(shape, generator=generator).to(device).contiguous(
        memory_format=torch.channels_last) for name, (_, shape) in entries.items()}
    times, names = {name: [] for name in entries}, list(entries)
    with torch.inference_mode():
        for _ in range(warmup + rounds):          # a machine that drifts does so under all of them alike
            for i in torch.randperm(len(names), generator=generator):    # in another order every time
                (module, _), x, visit = entries[names[i]], inputs[names[i]], []
                for _ in range(calls):
                    start = stamp(x)
                    module(x)
                    visit.append(milliseconds(start, stamp(x)))
                times[names[i]].append(min(visit[1:] or visit))
    return {name: ms[warmup:] for name, ms in times.items()}


def time_local(module, shape, device="cpu", rounds=20, warmup=3):
    """Median ms of module(x) as it is, x random of `shape`, channels_last; for several: `time_together`."""
    return statistics.median(time_together({0: (module, shape)}, device, rounds, warmup)[0])


def settled(times):
    """{name: [ms, one per round]} -> {name: lower quartile in ms, the pace of each round divided out}."""
    # A round's pace is its times over the names' own: a machine slows down under all of them alike. Lower
    # quartiles, since other programs only slow calls down: if over a fourth are spared, they alone count.
    ms = torch.tensor(list(times.values()), dtype=torch.float64)                    # (names, rounds)
    pace = (ms / ms.quantile(0.25, 1, keepdim=True)).quantile(0.25, 0)              # (rounds,)
    return dict(zip(times, (ms / pace).quantile(0.25, 1).tolist()))


def usable(device):
    """OSError of one line where a torch device is not available; one of several GPUs is made current."""
    try:
        kind = torch.device(device)
        if kind.type not in ("cpu", "cuda"):
            raise RuntimeError("nets are timed and scored on cpu and cuda alone")
        torch.ones(1, device=kind).item()
        if kind.type == "cuda" and kind.index is not None:
            torch.cuda.set_device(kind)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"--device {device} is not available here: {why}") from None


def machine(device):
    """What a local table was measured on; of a CPU the architecture and, on Linux, the model."""
    on_gpu, info = torch.device(device).type == "cuda", Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text() if os.access(info, os.R_OK) else "")
    cpu = " ".join(["CPU", platform.machine(), *models[:1]])
    return {"device": torch.cuda.get_device_name(device) if on_gpu else cpu,
            "runtime": f"torch {torch.__version__}", "precision": "float32",
            **({} if on_gpu else {"threads": torch.get_num_threads()}), "date": time.strftime("%Y-%m-%d")}


def afresh(call, *args, **kwargs):
    """call(*args, **kwargs), pickled, in a fresh Python process with as many threads; if it fails, here."""
    # Which caches a tensor meets depends on what its process did before: after training, some blocks took up
    # to 1.3 times as long. Not a process of `multiprocessing`: that would run the caller's script once more.
    child = (f"import sys; sys.path[:] = {sys.path}; out, sys.stdout = sys.stdout.buffer, sys.stderr; "
             f"import pickle, torch; torch.set_num_threads({torch.get_num_threads()}); "
             "call, args, kwargs = pickle.load(sys.stdin.buffer); pickle.dump(call(*args, **kwargs), out)")
    try:
        task = pickle.dumps((call, args, kwargs))
        done = subprocess.run([sys.executable, "-c", child], input=task, capture_output=True)
        if done.returncode == 0:
            return pickle.loads(done.stdout)
        why = (done.stderr.decode(errors="replace").splitlines() or [""])[-1]
    except Exception as error:                    # what cannot be pickled raises errors of many kinds
        why = f"{type(error).__name__}: {error}"
    print(f"no fresh process could do it ({why}): timed in this one, whose history counts", file=sys.stderr)
    return call(*args, **kwargs)


def inputs_of(net, sites, images):
    """{site: [what goes into its block for each image (1, 3, H, W), an array]}, by forward passes."""
    seen = {site: [] for site in sites}
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for site in sites:
            note = lambda module, inputs, site=site: seen[site].append(inputs[0].cpu().contiguous().numpy())
            hooks.callback(net.blocks()[site].register_forward_pre_hook(note).remove)
        for image in images:
            net(torch.as_tensor(image, device=next(net.parameters()).device))
    return seen


def distinct_modules(net, blocks, frame, deploy, device):
    """What has to be measured -> (keys {site: [key per option]}, {key: (deployed module, input shape)})."""
    net = deploy(net).to(device)
    met = inputs_of(net, blocks, [torch.zeros(1, 3, *frame)])
    # Blocks of one type and input shape are equal, and measured once; the whole net is "net", last.
    keys = {site: [(type(each).__name__, met[site][0].shape) for each in row] for site, row in blocks.items()}
    entries = {}
    for site, row in blocks.items():
        for key, block in zip(keys[site], row):   # the first one counts
            entries[key] = entries.get(key) or (deploy(block).to(device), key[1])
    return keys, {**entries, "net": (net, (1, 3, *frame))}


def time_in_place(keys, entries, device="cpu", rounds=60, warmup=3):
    """What `distinct_modules` gives -> {key: [ms, one per round]}; the net in `entries` is altered."""
    # Called over and over by itself, a block finds its input in the cache and its output's memory just freed,
    # unlike inside a net, whose skip connections hold on to theirs: sums of such times rank nets worse.
    keep_memory()
    (net, shape), spans, times = entries["net"], {}, {key: [] for key in entries}
    names = [next(name for name, m in net.named_modules() if m is net.blocks()[site]) for site in keys]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for key, (module, _) in entries.items():
        module.register_forward_pre_hook(lambda *_, key=key: spans.setdefault(key, []).append([stamp(x)]))
        module.register_forward_hook(lambda *_, key=key: spans[key][-1].append(stamp(x)))
    with torch.inference_mode():
        for _ in range(warmup + rounds):
            seen = {}                             # {key: [ms]}: a block type may be several options
            for k, options in enumerate(zip(*keys.values())):     # at all sites: drift hits all options alike
                for name, key in zip(names, options):
                    net.set_submodule(name, entries[key][0])
                spans.clear()
                net(x)
                for key, pairs in spans.items():
                    if key != "net" or k == 0:    # the net as it was: with option 0 everywhere
                        seen.setdefault(key, []).append(statistics.fmean(milliseconds(*p) for p in pairs))
            for key, ms in seen.items():
                times[key].append(statistics.fmean(ms))
    return {key: ms[warmup:] for key, ms in times.items()}


def whole_net(base_ms, sites):
    """{base_ms, rest_ms, scale}: with these, `network_ms` of the base net is the base net's ms, if known."""
    # Blocks that, timed alone, take longer together than the net that they are in (8 x 53 against 177 ms in
    # the paper) are scaled down to it, and leave nothing for the rest: no sum can be negative.
    total = sum(row[0] for row in sites.values())
    if base_ms is None or total <= base_ms:
        return {"base_ms": base_ms, "rest_ms": 0.0 if base_ms is None else base_ms - total, "scale": 1.0}
    return {"base_ms": base_ms, "rest_ms": 0.0, "scale": base_ms / total}


def local_timing(net, blocks, frame, deploy, device, rounds):
    """Times on `device`; blocks of equal (type, shape) share one."""
    keys, entries = distinct_modules(net, blocks, frame, deploy, device)
    ms = settled(time_in_place(keys, entries, device, rounds))
    sites = {site: [ms[key] for key in row] for site, row in keys.items()}
    return {**machine(device), "sites": sites, **whole_net(ms["net"], sites),
            "statistic": "lower quartile of interleaved rounds, the pace of each divided out"}


# ----------------------------------------------------------------------------- Qualcomm AI Hub: jobs

class Data(NamedTuple):
    """What may go to the hub with a module; arrays are float32 of its input's shape."""
    calibration: object = None    # () -> [array, ...] to quantise with
    inputs: tuple = ()            # what it is run on; none: random numbers
    judge: object = None          # [output of each input] -> a plain dict, noted with the result


def title(module, shape):
    """Type and input of a module, say NAFBlock 32x256x256."""
    return f"{getattr(module, 'name', type(module).__name__)} {'x'.join(map(str, shape[1:]))}"


def parse_profile(profile):
    """Milliseconds of a profile that the client downloaded; its times are integers in microseconds."""
    time_us = profile.get("execution_summary", {}).get("estimated_inference_time")
    if not time_us or time_us < 0:
        raise ValueError(f"the profile holds no inference time ({time_us})")
    return time_us / 1000


def ask(call, *args, wait=lambda: False, **kwargs):
    """call(...) of the client, repeated after a 429 while wait(); else errors are HubErrors of one line."""
    while True:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ == "RateLimitedError" and wait():     # the client has tried for some 15 s
                continue
            why = " ".join(re.findall(r"[^\s|┌─┐└┘]+", str(error))).rstrip(".")
            if type(error).__module__.split(".")[0] not in ("qai_hub", "botocore"):  # may quote the token
                why = (f"its client failed with {type(error).__name__}: check the network, and its "
                       "configuration, which `qai-hub configure --api_token TOKEN` writes")
            raise HubError(f"AI Hub: {why}; put that right and the same command goes on from here "
                           "(--force submits anew)") from None


def read_notes(path):
    """The notes of earlier runs, {} if there are none."""
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError, RecursionError):
        notes = json.loads(Path(path).read_text()) if path is not None and Path(path).exists() else {}
        if all(isinstance(note["name"], str) for note in notes.values()):
            return notes
    raise HubError(f"{path} is damaged: delete it, and its jobs are submitted anew")


class Session(NamedTuple):
    """One run on AI Hub."""
    client: object
    how: dict             # device, runtime, precision, options
    path: object          # JSON file of the notes; None: keep none
    notes: dict           # {job key: {name, an id per kind of job, then what `profile_hub` returns}}
    keys: tuple           # those of this run
    running: dict         # {job key: ([job, ...] in order, Data)}


def save_notes(session):
    """Write the notes, whole or not at all."""
    if session.path is None:
        return
    temporary = Path(f"{session.path}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            json.dump(session.notes, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(session.path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HubError(f"{session.path} cannot be written ({error.strerror}): make room there") from None


def show(session):
    """One line of progress, live on a terminal."""
    notes, live = [session.notes.get(key, {}) for key in session.keys], sys.stderr.isatty()
    submitted, compiled, ended = (sum(k in note for note in notes) for k in ("compile", "compiled", "ms"))
    failed = sum(note.get("ms", 0) is None for note in notes)
    line = (f"AI Hub: {len(notes)} modules, {submitted} submitted, {compiled} compiled, "
            f"{ended - failed} profiled, {failed} failed")
    end = "\r" if live and session.running else "\n"
    print(f"{line:<79}" if live else line, end=end, file=sys.stderr, flush=True)


def outcome(job, status, data):
    """What the last of a module's jobs gives: time, memory, layers, pictures as judged; or why not."""
    if status.failure:
        return {"reason": " ".join((status.message or "no reason given").split())}
    profile, outputs = ask(job.download_profile), ask(job.download_output_data) if data.inputs else None
    peak = profile.get("execution_summary", {}).get("estimated_inference_peak_memory") or -1
    try:
        return {"ms": parse_profile(profile), "layers": profile.get("execution_detail", []),
                "pictures": data.judge(next(iter(outputs.values()))) if outputs else None,
                "peak_mb": peak / 1e6 if peak > 0 else None, "version": getattr(job, "hub_version", "")}
    except ValueError as error:
        return {"reason": str(error)}


def look(session):
    """Note what has come of the jobs in flight; returns how many modules are still waited for."""
    for key, (jobs, data) in list(session.running.items()):
        for job in jobs:                          # a failed one raises nothing in this client: all are asked
            status = ask(job.get_status)
            if not status.success:
                break
            if job in jobs[-2:-1]:
                session.notes[key]["compiled"] = True
        if status.finished:
            found = outcome(job, status, data)
            session.notes[key].update({**NOTHING, "date": time.strftime("%Y-%m-%d"), "url": job.url, **found})
            del session.running[key]
            save_notes(session)
            show(session)
    return len(session.running)


def exported(module, shape):
    """The module, on the CPU, as a torch.export program for one input of `shape`: the same bits come out."""
    module = copy.deepcopy(module).to("cpu", memory_format=torch.contiguous_format)    # as converters expect
    return torch.export.export(module, (torch.zeros(shape),))


def upload(session, module, shape, name):
    """The module as an exported program, uploaded -> the client's model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "module.pt2")
        torch.export.save(exported(module, shape), path)
        return ask(session.client.upload_model, path, name)


def submitted(session, kind, source, name, shape, data):
    """A new job of this kind; source: a model, uploaded or from the job before."""
    import qai_hub
    client, how, int8 = session.client, session.how, qai_hub.QuantizeDtype.INT8
    target, wait = qai_hub.Device(how["device"]), lambda: look(session)     # what ends makes room for another
    if kind == "quantize":
        bits, given = {"w8a8": int8, "w8a16": qai_hub.QuantizeDtype.INT16}, {"x": data.calibration()}
        return ask(client.submit_quantize_job, source, given, int8, bits[how["precision"]], name, wait=wait)
    if kind == "profile":
        inputs = {"x": list(data.inputs)} if data.inputs else None
        return ask(client.submit_inference_job, source, target, inputs, name, how["options"],
                   retry=False, profile=True, wait=wait)
    runtime = "onnx" if kind == "onnx" else f"{how['runtime']} {how['options']}".strip()
    return ask(client.submit_compile_job, source, target, name, {"x": shape}, f"--target_runtime {runtime}",
               wait=wait)


def submit(session, key, module, shape, data):
    """Submit what the notes lack -> [job of each kind]; an id is noted the moment it exists."""
    note = session.notes.setdefault(key, {"name": f"{title(module, shape)} {os.urandom(6).hex()}"})
    save_notes(session)                           # the name before any job: by it `find_lost` knows them
    kinds = [*([] if session.how["precision"] == "float" else ["onnx", "quantize"]), "compile", "profile"]
    jobs = [ask(session.client.get_job, note[kind]) for kind in kinds if kind in note]
    try:
        for kind in kinds[len(jobs):]:
            name = f"{note['name']} {kind}"       # apart, since two of a module's jobs may be of one type
            source = ask(jobs[-1].get_target_model) if jobs else upload(session, module, shape, name)
            jobs.append(submitted(session, kind, source, name, shape, data))
            note[kind] = jobs[-1].job_id
            save_notes(session)
    except HubError:
        if not any(ask(job.get_status).failure for job in jobs):
            raise
    return jobs


def find_lost(session):
    """Note the ids of jobs whose creation was cut off before the answer came; jobs have unique names."""
    from qai_hub.client import JobType, UserError
    begun = {note["name"]: note for key, note in session.notes.items() if key in session.keys}
    for job_type in (JobType.COMPILE, JobType.QUANTIZE, JobType.INFERENCE) if begun else ():
        with contextlib.suppress(UserError):      # not every account may list its jobs
            for job in session.client.get_job_summaries(limit=200, type=job_type):
                name, _, kind = job.name.rpartition(" ")
                begun.get(name, {}).setdefault(kind, job.job_id)


def hub_client(device):
    """The hub's client, once its configuration, token and the device's name have been found good."""
    try:
        import qai_hub
    except ImportError:
        raise HubError("AI Hub needs its client: pip install qai-hub") from None
    client = qai_hub.Client()
    ask(client.set_verbose, False)
    names = {d.name for d in ask(client.get_devices)}
    if device not in names:
        nearest = ", ".join(difflib.get_close_matches(device, sorted(names), 5, 0))
        raise HubError(f"AI Hub has no device {device!r}; the nearest names: {nearest}")
    return client


def job_key(module, shape, device, runtime, precision="float", options="", data=Data()):
    """What a result belongs to: a module's printed form, since no time depends on weights, and how it ran."""
    kind = hashlib.sha256(repr(module).encode())
    if data.inputs:                               # weights and data count for what comes out
        calibration = data.calibration() if data.calibration and precision != "float" else ()
        for array in (*data.inputs, *calibration, *module.state_dict().values()):
            kind.update(torch.as_tensor(array).cpu().contiguous().numpy().tobytes())
    what = f"{title(module, shape)} {kind.hexdigest()[:12]}"
    return ", ".join(filter(None, [what, device, runtime, precision.replace("float", ""), options]))


def profile_hub(entries, device=HUB_DEVICE, runtime="tflite", jobs=None, force=False, precision="float",
                options=""):
    """Profile modules on a device of AI Hub, all jobs in flight together.

    entries {name: (module in eval mode, input shape[, Data])} -> {name: {ms (None if a job failed), reason,
    url, date, layers, each with its compute_unit, peak_mb, version, pictures: what Data.judge said}}.
    precision: of HUB_PRECISIONS, all but "float" needing Data.calibration; options: for compile and inference
    jobs; jobs: a JSON file that notes every job the moment it exists, so that a run that was cut off collects
    what it had submitted; force: submit anew all the same. The client finds its token by itself, in
    ~/.qai_hub/client.ini or the file that QAIHUB_CLIENT_INI names. HubError.
    """
    entries = {name: (*entry, Data())[:3] for name, entry in entries.items()}
    how = {"device": device, "runtime": runtime, "precision": precision, "options": options}
    keys = {name: job_key(*entry[:2], **how, data=entry[2]) for name, entry in entries.items()}
    notes = read_notes(jobs)
    todo = {keys[n]: entry for n, entry in entries.items() if force or "ms" not in notes.get(keys[n], {})}
    notes = {key: note for key, note in notes.items() if not (force and key in todo)}
    if todo:
        session = Session(hub_client(device), how, jobs, notes, tuple(todo), {})
        ask(find_lost, session)
        for key, entry in todo.items():
            session.running[key] = submit(session, key, *entry), entry[2]
            if sys.stderr.isatty() or len(session.running) == 1:
                show(session)                     # a log is told of the first one, and of each that ends
        pause = 0.25
        while look(session):
            time.sleep(pause := min(10, 2 * pause))                    # s, as the client itself does
    return {name: {k: notes[key].get(k, v) for k, v in NOTHING.items()} for name, key in keys.items()}


# ------------------------------------------------------------------------------------ latency tables

def remarks(table):
    """What a designer of blocks wants to know: options that do not run, blocks with layers on the CPU."""
    lines = []
    for name, found in table.get("modules", {}).items():
        where = f"{name} ({', '.join(found['sites'])})" if found.get("sites") else name
        on_cpu = [each["type"] or each["name"] for each in found["layers"] if each["compute_unit"] == "CPU"]
        if found["ms"] is None:
            lines.append(f"{where} is unavailable: {found['reason']} ({found['url']})")
        elif on_cpu:
            lines.append(f"{where} falls back to the CPU in {len(on_cpu)} of {len(found['layers'])} layers: "
                         f"{', '.join(sorted(set(on_cpu)))}")
    if table.get("scale", 1.0) < 1:
        lines.append(f"timed alone, the blocks at the sites take {table['base_ms'] / table['scale']:.1f} ms, "
                     f"the whole net that they are in {table['base_ms']:.1f}: whole nets are predicted from "
                     f"the blocks times {table['scale']:.2f}, and nothing for the rest")
    return lines


def without_zeros(module):
    """The module, in place, its all-zero parameters filled: a compiler may drop a branch scaled by zero."""
    for p in module.parameters():
        p.data.masked_fill_(~p.any(), 0.1)
    return module


def must_run(name, result, device, runtime, **_):
    """HubError where what is called `name` did not run."""
    if result["ms"] is None:
        raise HubError(f"the {name} does not run on {device} with {runtime}: {result['reason']} "
                       f"({result['url']}); give another --hub-runtime or --hub-device")


def hub_alone(net, blocks, frame, deploy, calibration, **how):
    """Every distinct block by itself -> (sites, `whole_net`, {what was profiled: result}) of a table."""
    keys, entries = distinct_modules(net, blocks, frame, deploy, "cpu")
    where = {key: [site for site, row in keys.items() if key in row] for key in entries}
    for key in entries.keys() - {"net"}:          # calibrated with what goes into the block in the net
        met = lambda site=where[key][0]: inputs_of(net, [site], calibration())[site]
        entries[key] = (without_zeros(entries[key][0]), entries[key][1], Data(met))
    found = profile_hub({**entries, "net": (*entries["net"], Data(calibration))}, **how)
    for site, row in keys.items():
        must_run(f"original block at {site}", found[row[0]], **how)
    sites = {site: [found[key]["ms"] for key in row] for site, row in keys.items()}
    return sites, whole_net(found["net"]["ms"], sites), {         # the net may not run where its blocks do
        title(*entries[key][:2]): {**found[key], "sites": where[key]} for key in entries}


def hub_inside(net, blocks, frame, deploy, calibration, **how):
    """The base net, and for every site and option the base net with that swap: as `hub_alone`."""
    base, same = deploy(net), {(site, 0): (None, 0) for site in blocks}
    met = inputs_of(base, base.blocks(), [torch.zeros(1, 3, *frame)])
    program = lambda site, block: () if isinstance(block, nn.Identity) else (        # with its stage
        site.split(".")[0], str(exported(block, met[site][0].shape)))
    own = {site: program(site, block) for site, block in base.blocks().items()}
    nets, known = {(None, 0): base}, {sum(own.values(), ()): (None, 0)}      # by the programs of their blocks
    shared = {id(p): p for p in base.parameters()}
    for site, row in blocks.items():
        for k, block in enumerate(row[1:], start=1):
            block = without_zeros(deploy(block))
            programs = sum({**own, site: program(site, block)}.values(), ())
            same[site, k] = key = known.setdefault(programs, (site, k))
            if key not in nets:
                nets[key] = copy.deepcopy(base, {**shared, id(base.blocks()[site]): block})
    found = profile_hub({key: (each, (1, 3, *frame), Data(calibration)) for key, each in nets.items()}, **how)
    must_run("base net", found[None, 0], **how)
    base_ms, sites = found[None, 0]["ms"], {}
    # An option's time is the original's plus what the swap changes; the original's is what its best swap
    # saves, but at least an equal share of the net. So base and single swaps are predicted exactly.
    for site, row in blocks.items():
        ms = [found[same[site, k]]["ms"] for k in range(len(row))]
        original_ms = max(base_ms / len(blocks), base_ms - min(value for value in ms if value is not None))
        sites[site] = [None if value is None else original_ms + value - base_ms for value in ms]
    rest_ms = base_ms - sum(row[0] for row in sites.values())
    return sites, {"base_ms": base_ms, "rest_ms": rest_ms, "scale": 1.0}, {
        f"{type(blocks[at][number]).__name__} at {at}" if number else "base net":
        {**found[at, number], "sites": [site for site, k in same if k and same[site, k] == (at, number)]}
        for at, number in nets}


def hub_timing(net, blocks, frame, deploy, inside=False, calibration=None, **how):
    """Table entries from a device of AI Hub, of blocks by themselves or inside the whole net."""
    how = {"device": HUB_DEVICE, "runtime": "tflite", "precision": "float", "options": "", **how}
    timing = hub_inside if inside else hub_alone
    sites, whole, modules = timing(net, blocks, frame, deploy, calibration, **how)
    return {"device": how["device"], "runtime": how["runtime"],
            **({"hub options": how["options"]} if how["options"] else {}),
            "precision": how["precision"].replace("float", "float32 as uploaded"),
            "date": max(result["date"] for result in modules.values()), "sites": sites, **whole,
            "statistic": "the hub's own estimate (by its documentation the minimum of about 100 runs)",
            "modules": modules}


def paper_timing(sites, n_options):
    """Table 2 at every site. It gives no time for the rest of the net, so that counts as 0."""
    if n_options != len(PAPER_BLOCK_MS):
        raise ValueError(f"the paper's table has {len(PAPER_BLOCK_MS)} options, this search {n_options}: "
                         "use --target local")
    return {"device": f"{HUB_DEVICE} (published, not measured here)", "runtime": "not stated",
            "precision": "not stated", "date": "as published", "rest_ms": 0.0, "scale": 1.0,
            "base_ms": PAPER_BASE_MS, "sites": {site: list(PAPER_BLOCK_MS) for site in sites}}


def latency_table(net, surrogates, sites, frame, target, deploy=None, device="cpu", rounds=60, hub=None):
    """Latency of every option at every site, of the rest of the net, and of the whole base net.

    net: a blocks.NAFNet; surrogates {site: {option: module}}, trained or not (an nn.Identity takes no time,
    and is not timed); frame: (H, W) or one side, in pixels; target "local" (this machine), "qai-hub" (`hub`:
    more arguments of `hub_timing`) or "paper" (its table 2); deploy: makes a module ready for inference, by
    default as a copy in eval mode. Alters nothing given. ValueError (another target, option count), HubError.
    """
    frame, hub = (frame, frame) if isinstance(frame, int) else tuple(frame), hub or {}
    deploy = deploy or (lambda module: copy.deepcopy(module).eval())
    rows = {s: [net.blocks()[s], *(surrogates[s][k] for k in sorted(surrogates[s]))] for s in sites}
    blocks = {site: [block for block in row if hub.get("inside") or not isinstance(block, nn.Identity)]
              for site, row in rows.items()}      # inside the net, leaving the block out is timed too
    if target == "paper":
        timing = paper_timing(sites, len(next(iter(blocks.values()), [])))
    elif target == "local":
        timing = local_timing(net, blocks, frame, deploy, device, rounds)
    elif target == "qai-hub":
        timing = hub_timing(net, blocks, frame, deploy, **hub)
    else:
        raise ValueError(f"latency_table: target {target!r} is none of 'local', 'qai-hub' and 'paper'")
    options = [type(block).__name__ for block in next(iter(rows.values()), [])]
    ms = {site: iter(row) for site, row in timing["sites"].items()}
    timing["sites"] = {site: [next(ms[site]) if block in blocks[site] else 0.0 for block in row]
                       for site, row in rows.items()}
    return {"target": target, "frame": list(frame), "options": options, **timing}


def network_ms(table, choice):
    """Predicted ms of a whole net: rest and one block per site, by default 0; infinite if one cannot run."""
    rows = [row[choice.get(site, 0)] for site, row in table["sites"].items()]
    return float("inf") if None in rows else max(0.0, table["rest_ms"] + table.get("scale", 1.0) * sum(rows))


# ------------------------------------------------------------------ the operators blocks are made of

class Operator(nn.Module):
    """A named function of x as a module."""

    def __init__(self, name, forward):
        super().__init__()
        self.name, self.forward = name, forward

    def extra_repr(self):
        return self.name


def operators(channels):
    """{name: module} of what NAF blocks and their alternatives consist of, at `channels`."""
    return {"1x1 convolution": nn.Conv2d(channels, channels, 1),
            "3x3 convolution": nn.Conv2d(channels, channels, 3, padding=1),
            "3x3 depthwise": nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            "channel layer norm": Operator("channel_layer_norm", lambda x: nn.functional.layer_norm(
                x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)),
            "batch norm": nn.BatchNorm2d(channels),
            "pool, broadcast product": Operator("pool_product", lambda x: x * x.mean((2, 3), keepdim=True)),
            "gate (half channels)": Operator("gate", lambda x: torch.mul(*x.chunk(2, dim=1))),
            "ReLU": nn.ReLU()}


def print_operators(args):
    """Measure and print what `main` was asked for; HubError or OSError where that cannot be done."""
    if args.width < 2 or args.width % 2 or args.frame < 16:
        raise OSError(f"--width {args.width} must be even, --frame {args.frame} at least 16")
    usable(args.device)
    shapes = [(1, args.width * 2 ** i, args.frame // 2 ** i, args.frame // 2 ** i) for i in range(5)]
    sizes = ["x".join(map(str, shape[1:])) for shape in shapes]
    entries = {f"{name} {size}": (module.eval().to(args.device, memory_format=torch.channels_last), shape)
               for shape, size in zip(shapes, sizes) for name, module in operators(shape[1]).items()}
    local, hub = args.target == "local", {"device": args.hub_device, "runtime": args.hub_runtime}
    found = {} if local else profile_hub(entries, **hub, jobs=args.jobs, force=args.force)
    ms = settled(time_together(entries, args.device)) if local else {key: found[key]["ms"] for key in found}
    where = machine(args.device) if local else hub
    print(f"milliseconds on {where['device']}, {where['runtime']}, {time.strftime('%Y-%m-%d')}"
          + (f", {torch.get_num_threads()} threads" if local else ""))
    print(f"{'':<26}" + "".join(f"{size:>14}" for size in sizes))
    for name in operators(2):
        row = [ms[f"{name} {size}"] for size in sizes]
        print(f"{name:<26}" + "".join(f"{'fails' if t is None else format(t, '.3f'):>14}" for t in row))
    print("".join(f"{line}\n" for line in remarks({"modules": found})), end="")


def main(argv=None):
    """Print operator latencies at the shapes of a NAFNet: of this machine, or of a device of AI Hub."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--target", choices=["local", "qai-hub"], default="local")
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution")
    parser.add_argument("--frame", type=int, default=256, help="side of the net's input, pixels")
    parser.add_argument("--device", default="cpu", help="torch device of target local")
    parser.add_argument("--hub-device", default=HUB_DEVICE)
    parser.add_argument("--hub-runtime", choices=HUB_RUNTIMES, default=HUB_RUNTIMES[0])
    parser.add_argument("--jobs", default="profile_jobs.json", help="where AI Hub jobs are noted")
    parser.add_argument("--force", action="store_true", help="submit AI Hub jobs anew")
    try:
        print_operators(parser.parse_args(argv))
    except (HubError, OSError) as error:
        print(f"profile_device: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
