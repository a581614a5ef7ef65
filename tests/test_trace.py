"""Spans are kept from every thread, and the trace file is one that Chrome's viewers open."""

import itertools
import json
import threading

from hypothesis import given
from hypothesis import strategies as st

from hf_flash import trace
from hf_flash.trace import Recorder


def test_nothing_is_recorded_unless_asked_for() -> None:
    assert trace.active is None


def test_spans_of_threads_are_kept_apart() -> None:
    recorder = Recorder()
    together = threading.Barrier(4)  # all alive at once: idents are used again

    def work(name: str) -> None:
        together.wait()
        for i in range(500):
            recorder.add(name, float(i), i + 0.5, "layer", number=i)
        together.wait()

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.spans) == 2000
    for i in range(4):
        mine = [span for span in recorder.spans if span.name == f"t{i}"]
        assert [span.args["number"] for span in mine] == list(range(500))
        assert len({span.track for span in mine}) == 1


def test_chrome_json() -> None:
    recorder = Recorder()
    recorder.add("inner", 10.001, 10.002, "layers.0.mlp", wanted=7)
    recorder.add("outer", 10.0, 10.003)
    recorder.add_read(10.0005, 10.0015, 4096)
    found = json.loads(json.dumps(recorder.to_chrome()))
    spans = {event["name"]: event for event in found["traceEvents"] if event["ph"] == "X"}
    assert spans["outer"]["ts"] == 0 and abs(spans["outer"]["dur"] - 3000) < 1
    assert abs(spans["inner"]["ts"] - 1000) < 1 and spans["inner"]["args"] == {"layer": "layers.0.mlp", "wanted": 7}
    assert spans["inner"]["tid"] == spans["outer"]["tid"] != spans["read"]["tid"]
    assert spans["read"]["args"] == {"bytes": 4096} and spans["read"]["cat"] == "flash"
    names = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert names[spans["read"]["tid"]] == "flash 1" and names[spans["outer"]["tid"]] == threading.current_thread().name
    assert {event["ph"] for event in found["traceEvents"]} == {"M", "X"}
    assert Recorder().to_chrome()["traceEvents"][0]["name"] == "process_name"


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), max_size=30))
def test_reads_of_one_lane_do_not_overlap(reads: list[tuple[int, int]]) -> None:
    recorder = Recorder()
    for start, seconds in reads:
        recorder.add_read(float(start), float(start + seconds), 1)
    lanes: dict[int, list[tuple[float, float]]] = {}
    for event in recorder.to_chrome()["traceEvents"]:
        if event["ph"] == "X":
            lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for lane in lanes.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(lane))
    most = max((sum(s <= at <= s + d for s, d in reads) for at, _ in reads), default=0)
    assert len(lanes) <= most
