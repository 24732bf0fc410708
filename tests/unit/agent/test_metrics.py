# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is counted, and that it stays bounded."""

import asyncio
import socket

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from kvmi_host.agent.metered import EVERY, MeteredSession
from kvmi_host.agent.metrics import MAX_VMS, Metrics, Trouble
from kvmi_host.protocol import EventId, messages
from kvmi_host.testing.peer import SimulatedKernel


@pytest.fixture
def metrics():
    return Metrics()


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_events_are_counted_by_vm_and_kind(metrics):
    metrics.session_begins("a").events[EventId.CR] += 2
    metrics.session_begins("b").events[EventId.CR] += 1
    assert value(metrics, "kvmi_events_total", vm="a", kind="cr") == 2
    assert value(metrics, "kvmi_events_total", vm="b", kind="cr") == 1


def test_a_vm_that_comes_back_counts_on(metrics):
    counts = metrics.session_begins("a")
    counts.events[EventId.CR] += 2
    metrics.session_ends(counts)
    metrics.session_begins("a").events[EventId.CR] += 1
    assert value(metrics, "kvmi_events_total", vm="a", kind="cr") == 3


def test_sessions_are_counted_now_and_ever(metrics):
    counts = metrics.session_begins("a")
    metrics.session_begins("b")
    metrics.session_ends(counts)
    assert value(metrics, "kvmi_sessions") == 1
    assert value(metrics, "kvmi_sessions_begun_total") == 2


def test_errors_have_a_type_from_the_start(metrics):
    metrics.errors[Trouble.HANDLER] += 1
    assert value(metrics, "kvmi_errors_total", type="handler") == 1
    assert value(metrics, "kvmi_errors_total", type="session") == 0


def test_the_numbers_of_vms_that_are_gone_are_dropped_for_those_of_others(metrics):
    stays = metrics.session_begins("stays")
    for number in range(MAX_VMS + 5):
        metrics.session_ends(metrics.session_begins(f"vm{number}"))
    assert stays.sessions == 1
    assert value(metrics, "kvmi_handler_errors_total", vm="stays") == 0
    assert value(metrics, "kvmi_handler_errors_total", vm="vm5") is None
    assert value(metrics, "kvmi_handler_errors_total", vm=f"vm{MAX_VMS + 4}") == 0


def test_a_histogram_counts_what_is_at_most_each_bound(metrics):
    for seconds in (25e-6, 26e-6, 100.0):
        metrics.handling.observe(seconds)
    buckets = {bound: value(metrics, "kvmi_event_seconds_bucket", le=bound) for bound in ("2.5e-05", "5e-05", "+Inf")}
    assert buckets == {"2.5e-05": 1, "5e-05": 2, "+Inf": 3}
    assert value(metrics, "kvmi_event_seconds_count") == 3
    assert value(metrics, "kvmi_event_seconds_sum") == pytest.approx(100.000051)


@pytest.mark.parametrize("generate", [generate_latest, generate_openmetrics])
def test_a_name_that_a_vm_made_up_stays_a_label(metrics, generate):
    metrics.session_begins('x"} 1\nkvmi_sessions 5 #')
    text = generate(metrics.registry).decode()
    assert [line for line in text.splitlines() if line.startswith("kvmi_sessions ")] == ["kvmi_sessions 1.0"]


def test_openmetrics_takes_it_all(metrics):
    metrics.session_begins("a").events[EventId.CR] += 1
    names = [family.name for family in parse_openmetrics(generate_openmetrics(metrics.registry).decode())]
    assert {"kvmi_events", "kvmi_event_seconds", "process_resident_memory_bytes"} <= set(names)
    assert len(names) == len(set(names))


def test_an_event_in_so_many_is_timed_from_its_arrival_until_it_is_answered(metrics, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr("kvmi_host.agent.metered.perf_counter", lambda: clock[0])

    async def events():
        ours, kernels = socket.socketpair()
        with kernels, SimulatedKernel(kernels) as kernel:
            session = await MeteredSession.open(ours, timeout=5.0)
            session.handling = metrics.handling
            await session.ask(messages.get_version())  # its answer is no event: the next one is timed
            for _ in range(EVERY + 1):
                kernel.fire(EventId.HYPERCALL)
                event = await session.next_event()
                clock[0] += 2.0
                session.reply(event)
                await asyncio.to_thread(kernel.await_running)
            session.close()
            await session.wait_closed()

    asyncio.run(events())
    assert value(metrics, "kvmi_event_seconds_count") == 2
    assert value(metrics, "kvmi_event_seconds_sum") == pytest.approx(4.0)
