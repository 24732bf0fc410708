#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# operator.sh: what a host's operator does in a day, by the command line alone: two guests of libvirt and a QEMU started
# by hand are attached to at once, a Linux guest is watched at its work, saved and restored, and nothing is left behind.
# As root, on a host with introspection and libvirt. It says what it does, and ends with "no trace is left".

set -euo pipefail
export LC_ALL=C.UTF-8 KVMI_POLICIES

linux=operator-linux
walk=operator-walk
images=${KVMI_IMAGES:-/opt/kvmi-host/images}
deadline=${OPERATOR_DEADLINE:-600} # seconds for anything
work=$(mktemp -d)
KVMI_POLICIES=$work/policies
mkdir "$KVMI_POLICIES"
by_hand=

tidy_up() {
	status=$?
	if [ "$status" -ne 0 ]; then
		say "failed with $status; what the sessions said:"
		tail -n 3 "$work"/*.json "$work"/*.log 2> /dev/null || true
	fi
	[ -z "$by_hand" ] || kill "$by_hand" 2> /dev/null || true
	for guest in "$linux" "$walk"; do
		virsh --quiet undefine --managed-save "$guest" &> /dev/null || true
		virsh --quiet destroy "$guest" &> /dev/null || true
	done
	rm -rf "$work"
}
trap tidy_up EXIT

say() {
	echo "operator: ${SECONDS} s: $*"
}

die() {
	say "$*"
	exit 1
}

# One field of a JSON object on standard input: field serial_log
field() {
	python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

# Wait for a line with a word in a file, after so many others with it: await FILE WORD [COUNT]
await() {
	local follower found=0
	exec {lines}< <(exec timeout "$deadline" tail -n +1 -F "$1" 2> /dev/null)
	follower=$!
	grep -q -m "$((${3:-0} + 1))" "$2" <&"$lines" && [ "$(grep -c "$2" "$1")" -gt "${3:-0}" ] && found=1
	kill "$follower" 2> /dev/null || true
	exec {lines}<&-
	[ "$found" -eq 1 ] || die "no '$2' came in $1"
}

# What a host would have more of if something stayed: guests, files, sockets, processes, sessions. Logs are to stay.
traces() {
	kvmi-host guest list
	# Not all of these folders need be there.
	{ find /etc/libvirt /etc/kvmi-host /var/lib/libvirt /run/libvirt /run/kvmi-agent /tmp /var/tmp \
		-path "$work" -prune -o -print 2> /dev/null || true; } | sort
	awk '$8 ~ "^/" { print $8 }' /proc/net/unix | sort -u
	pgrep -l "^(qemu|kvm)" | sort || true
	grep -H . /sys/module/kvm*/refcnt
}

kvmi-host guest list > /dev/null # libvirt has started, with all that it makes for itself
traces > "$work/before"

say "two guests through libvirt, and a QEMU by hand"
log=$(kvmi-host guest create "$linux" --image linux --start --json | field serial_log)
await "$log" "kvmi-guest: alive" # the others would have the CPU
walk_log=$(kvmi-host guest create "$walk" --image modewalk --start --json | field serial_log)
qemu-system-x86_64 -accel kvm -cpu host -m 32 -nodefaults -display none \
	-kernel "$images/puppet.elf" -serial "file:$work/by-hand.log" &
by_hand=$!
kvmi-host guest list
await "$walk_log" "modewalk: 1 vcpus"
await "$work/by-hand.log" "puppet: 1 vcpus"

say "attaching to all three while they run"
echo 'events = ["hypercall", "unhook"]' > "$KVMI_POLICIES/$walk.toml"
kvmi-host attach "$walk" --events hypercall --json > "$work/walk.json" &
walk_session=$!
kvmi-host attach "pid:$by_hand" --events create-vcpu --json > "$work/by-hand.json" &
by_hand_session=$!
await "$work/walk.json" '"event": "hypercall"'
await "$work/by-hand.json" '"event": "create-vcpu"'
head -n 1 "$work/walk.json"
grep -q "\"policy\": \"$KVMI_POLICIES/$walk.toml\"" "$work/walk.json" || die "the policy file does not count"

say "what the policy file does not have is refused"
! kvmi-host attach "$walk" --allow full 2> "$work/refused.log" || die "full was allowed"
cat "$work/refused.log"
grep -q "does not allow" "$work/refused.log" || die "that is another error"

say "CR3 writes of $linux, which is at work"
kvmi-host attach "$linux" --events cr3 --json --count 200 > "$work/linux.json"
python3 - "$work/linux.json" << 'END'
import json, sys

first, *events, last = map(json.loads, open(sys.argv[1]))
summary = last["summary"]
spaces = {event["new"] & ~0xFFF for event in events}
assert first["session"]["policy"] == "observe"
assert {(event["event"], event["cr"]) for event in events} == {("cr", 3)}
assert summary["seq_gaps"] == summary["seq_repeated"] == 0
assert len(spaces) > 3, spaces
print(f"{len(events)} writes to CR3, {len(spaces)} address spaces, {summary['events_per_second']} a second")
END

say "detaching"
kvmi-host detach "$walk"
kvmi-host detach "pid:$by_hand"
wait "$walk_session" "$by_hand_session"
tail -n 1 "$work/walk.json" | grep -q '"ended": "unhook"' || die "the session did not end as it was asked to"

say "saving and restoring $linux"
beats=$(grep -c "kvmi-guest: alive" "$log")
kvmi-host guest save "$linux"
kvmi-host guest list
kvmi-host guest start "$linux"
# libvirt begins the log anew; the guest goes on where it was.
await "$log" "kvmi-guest: alive"
[ "$(grep -o 'alive [0-9]*' "$log" | tail -n 1 | cut -d' ' -f2)" -gt "$beats" ] || die "the guest began anew"
kvmi-host attach "$linux" --events cr3 --json --count 20 | tail -n 1

say "taking it all down"
kvmi-host guest destroy "$linux"
kvmi-host guest destroy "$walk"
kill "$by_hand"
wait "$by_hand" || true
by_hand=
traces > "$work/after"
diff "$work/before" "$work/after" || die "that was left behind"
say "no trace is left"
