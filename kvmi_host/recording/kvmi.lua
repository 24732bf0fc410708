-- SPDX-License-Identifier: LGPL-2.1-or-later
--
-- KVMI, version 6 (dialect v6), for Wireshark and tshark 4.0 and newer:
--
--     wireshark -X lua_script:kvmi.lua RECORDING
--
-- or put this file into Wireshark's folder of personal Lua plugins. A recording names this dissector itself.
--
-- A frame is one message. Its direction, which tells a command from its answer, is that of the frame. Commands and
-- answers, events and replies are joined by their seq. The tables of numbers are those of kvmi_host.protocol, and a test
-- holds them to it.

local commands = {
	[0] = "event-reply",
	[1] = "event",
	[2] = "get-version",
	[3] = "check-command",
	[4] = "check-event",
	[5] = "get-guest-info",
	[6] = "get-vcpu-info",
	[7] = "pause-vcpu",
	[8] = "control-vm-events",
	[9] = "control-events",
	[10] = "control-cr",
	[11] = "control-msr",
	[12] = "control-ve",
	[13] = "get-registers",
	[14] = "set-registers",
	[15] = "get-cpuid",
	[16] = "get-xsave",
	[17] = "read-physical",
	[18] = "write-physical",
	[19] = "inject-exception",
	[20] = "get-page-access",
	[21] = "set-page-access",
	[22] = "get-map-token",
	[23] = "get-mtrr-type",
	[24] = "control-spp",
	[25] = "get-page-write-bitmap",
	[26] = "set-page-write-bitmap",
	[27] = "control-cmd-response",
	[29] = "get-max-gfn",
}
local EVENT_REPLY, EVENT = 0, 1

local events = {
	[0] = "unhook",
	[1] = "cr",
	[2] = "msr",
	[3] = "xsetbv",
	[4] = "breakpoint",
	[5] = "hypercall",
	[6] = "pf",
	[7] = "trap",
	[8] = "descriptor",
	[9] = "create-vcpu",
	[10] = "pause-vcpu",
	[11] = "singlestep",
}

local actions = {
	[0] = "continue",
	[1] = "retry",
	[2] = "crash",
}

local errors = {
	[0] = "ok",
	[-1] = "EPERM",
	[-2] = "ENOENT",
	[-11] = "EAGAIN",
	[-12] = "ENOMEM",
	[-14] = "EFAULT",
	[-16] = "EBUSY",
	[-22] = "EINVAL",
	[-95] = "EOPNOTSUPP",
}

local descriptors = {
	[1] = "idtr",
	[2] = "gdtr",
	[3] = "ldtr",
	[4] = "tr",
}

local msrs = {
	[0x10] = "tsc",
	[0x1b] = "apic-base",
	[0x48] = "spec-ctrl",
	[0x174] = "sysenter-cs",
	[0x175] = "sysenter-esp",
	[0x176] = "sysenter-eip",
	[0x1a0] = "misc-enable",
	[0x1d9] = "debugctl",
	[0x277] = "pat",
	[0x2ff] = "mtrr-def-type",
	[0xc0000080] = "efer",
	[0xc0000081] = "star",
	[0xc0000082] = "lstar",
	[0xc0000083] = "cstar",
	[0xc0000084] = "sfmask",
	[0xc0000100] = "fs-base",
	[0xc0000101] = "gs-base",
	[0xc0000102] = "kernel-gs-base",
	[0xc0000103] = "tsc-aux",
}

local memory_types = {
	[0] = "uncacheable",
	[1] = "write-combining",
	[4] = "write-through",
	[5] = "write-protected",
	[6] = "write-back",
}

local modes = { [2] = "16-bit", [4] = "32-bit", [8] = "64-bit" }
local access = { [0] = "---", "r--", "-w-", "rw-", "--x", "r-x", "-wx", "rwx" }

-- Layouts: names of fields with their size in bytes, in order; "-" is padding, which must be zero; regs, sregs and msrs
-- are the structures of the KVM API. "each" is repeated to the end of the message, "rest" takes what is left.

local event_layout = "size:2 vcpu:2 event:1 -:3 mode:1 -:7 regs sregs msrs"

local own_data = {
	[1] = "cr:2 -:6 old:8 new:8",
	[2] = "msr:4 -:4 old:8 new:8",
	[4] = "gpa:8 insn_len:1 -:7",
	[6] = "gva:8 gpa:8 access:1 -:1 view:2 -:4",
	[7] = "vector:4 type:4 error_code:4 -:4 cr2:8",
	[8] = "descriptor:1 write:1 -:6",
}

local reply_layout = "vcpu:2 -:6 action:1 event:1 -:6"

local own_reply = {
	[1] = "new_val:8",
	[2] = "new_val:8",
	[6] = "ctx_addr:8 ctx_size:4 singlestep:1 rep_complete:1 -:2 ctx_data:256",
}

local requests = {
	[3] = "checked_command:2 -:6",
	[4] = "event:2 -:6",
	[6] = "vcpu:2 -:6",
	[7] = "vcpu:2 -:6 wait:1 -:7",
	[8] = "event:2 enable:1 -:5",
	[9] = "vcpu:2 -:6 event:2 enable:1 -:5",
	[10] = "vcpu:2 -:6 enable:1 -:3 cr:4",
	[11] = "vcpu:2 -:6 enable:1 -:3 msr:4",
	[12] = "vcpu:2 -:6 rest data",
	[13] = "vcpu:2 -:6 nmsrs:2 -:6 each msr:4",
	[14] = "vcpu:2 -:6 regs",
	[15] = "vcpu:2 -:6 function:4 index:4",
	[16] = "vcpu:2 -:6",
	[17] = "gpa:8 length:8",
	[18] = "gpa:8 length:8 rest data",
	[19] = "vcpu:2 -:6 vector:1 has_error:1 -:2 error_code:4 address:8",
	[20] = "view:2 count:2 -:4 each gpa:8",
	[21] = "view:2 count:2 -:4 each gpa:8 access:1 -:7",
	[22] = "rest data",
	[23] = "gpa:8",
	[24] = "rest data",
	[25] = "rest data",
	[26] = "rest data",
	[27] = "enable:1 now:1 -:6",
}

local answers = {
	[2] = "version:4 -:4",
	[5] = "vcpu_count:4 -:12",
	[6] = "tsc_speed:8",
	[13] = "mode:4 -:4 regs sregs nmsrs:4 -:4 each msr:4 -:4 value:8",
	[15] = "eax:4 ebx:4 ecx:4 edx:4",
	[16] = "rest data",
	[17] = "rest data",
	[20] = "each access:1",
	[23] = "memory_type:1 -:7",
	[29] = "gfn:8",
}

local registers = {
	"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
	"r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
}
local segments = { "cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt" }
local segment_layout = "base:8 limit:4 selector:2 type:1 present:1 dpl:1 db:1 s:1 l:1 g:1 avl:1 unusable:1 -:1"
local tables = { "gdt", "idt" }
local table_layout = "base:8 limit:2 -:6"
local control = { "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base" }
local event_msrs = {
	"sysenter_cs", "sysenter_esp", "sysenter_eip", "efer", "star", "lstar", "cstar", "pat", "shadow_gs",
}

-- The fields, by the name that a display filter has after "kvmi."

local kvmi = Proto("kvmi", "Kernel Virtual Machine Introspection")
local fields = {}

local function define(name, kind, title, base, values)
	local make = ProtoField[kind]
	fields[name] = base and make("kvmi." .. name, title, base, values) or make("kvmi." .. name, title)
end

define("command", "uint16", "Message", base.DEC, commands)
define("payload_size", "uint16", "Payload size", base.DEC)
define("seq", "uint32", "Seq", base.DEC)
define("error", "int32", "Error", base.DEC, errors)
define("vcpu", "uint16", "vCPU", base.DEC)
define("event", "uint16", "Event", base.DEC, events)
define("size", "uint16", "Size of the event without its own data", base.DEC)
define("mode", "uint32", "Mode (operand size in bytes)", base.DEC, modes)
define("action", "uint8", "Action", base.DEC, actions)
define("checked_command", "uint16", "Command", base.DEC, commands)
for _, name in ipairs({ "wait", "enable", "now", "write", "has_error", "singlestep", "rep_complete" }) do
	define(name, "uint8", name, base.DEC)
end
for _, name in ipairs({ "cr", "vector", "type", "count", "nmsrs", "view", "version", "vcpu_count", "insn_len", "ctx_size" }) do
	define(name, "uint32", name, base.DEC)
end
for _, name in ipairs({ "error_code", "function", "index", "eax", "ebx", "ecx", "edx" }) do
	define(name, "uint32", name, base.HEX)
end
for _, name in ipairs({ "old", "new", "new_val", "value", "gpa", "gva", "gfn", "address", "ctx_addr", "cr2" }) do
	define(name, "uint64", name, base.HEX)
end
define("length", "uint64", "Length in bytes", base.DEC)
define("tsc_speed", "uint64", "TSC frequency in Hz", base.DEC)
define("msr", "uint32", "MSR", base.HEX, msrs)
define("access", "uint8", "Access", base.DEC, access)
define("descriptor", "uint8", "Descriptor table register", base.DEC, descriptors)
define("memory_type", "uint8", "Memory type", base.DEC, memory_types)
define("data", "bytes", "Data")
define("ctx_data", "bytes", "Context data")
define("regs", "none", "General registers")
define("sregs", "none", "Special registers")
define("msrs", "none", "MSRs")
define("more", "bytes", "More than is known here")
define("answered_in", "framenum", "Answered in", base.NONE, frametype and frametype.RESPONSE)
define("answer_to", "framenum", "Answer to", base.NONE, frametype and frametype.REQUEST)
define("time", "relative_time", "Time until the answer")
for _, name in ipairs(registers) do
	define("regs." .. name, "uint64", name, base.HEX)
end
local function define_part(name, layout)
	define("sregs." .. name, "none", name)
	for field, size in layout:gmatch("(%l+):(%d)") do
		define("sregs." .. name .. "." .. field, "uint" .. 8 * size, field, base.HEX)
	end
end
for _, name in ipairs(segments) do
	define_part(name, segment_layout)
end
for _, name in ipairs(tables) do
	define_part(name, table_layout)
end
for _, name in ipairs(control) do
	define("sregs." .. name, "uint64", name, base.HEX)
end
define("sregs.interrupt_bitmap", "bytes", "interrupt_bitmap")
for _, name in ipairs(event_msrs) do
	define("msrs." .. name, "uint64", name, base.HEX)
end
kvmi.fields = fields

local parts_of = { regs = {}, sregs = {}, msrs = {} } -- the fields in each
for name, field in pairs(fields) do
	local structure = name:match("^(%l+)%.")
	if structure then
		table.insert(parts_of[structure], field)
	end
end

local short = ProtoExpert.new("kvmi.short", "The message ends too early", expert.group.MALFORMED, expert.severity.ERROR)
local long = ProtoExpert.new("kvmi.long", "More than is known here", expert.group.UNDECODED, expert.severity.NOTE)
local padding = ProtoExpert.new("kvmi.padding", "Padding that is not zero", expert.group.PROTOCOL, expert.severity.WARN)
local refused = ProtoExpert.new("kvmi.refused", "Refused", expert.group.RESPONSE_CODE, expert.severity.NOTE)
local astray = ProtoExpert.new("kvmi.astray", "Not from this side", expert.group.PROTOCOL, expert.severity.ERROR)
kvmi.experts = { short, long, padding, refused, astray }

-- A cursor over a message: where it is in it, and whether what follows may be missing (as in replies of older tools).

local function left(cursor)
	return cursor.tvb:len() - cursor.at
end

local function take(cursor, tree, field, size, name)
	if left(cursor) < size then
		if not cursor.may_end and not cursor.ended then
			tree:add_proto_expert_info(short, "The message ends before " .. name)
		end
		cursor.ended = true
		return nil
	end
	local range = cursor.tvb(cursor.at, size)
	cursor.at = cursor.at + size
	if field then
		return range, tree:add_le(field, range)
	end
	if range:bytes():tohex():find("[^0]") then
		tree:add_proto_expert_info(padding)
	end
	return range
end

local dissect_layout

local function dissect_values(cursor, tree, name, names, values)
	local size = 8 * #names
	local subtree = tree:add(fields[name], cursor.tvb(cursor.at, math.min(size, left(cursor))))
	for _, value in ipairs(names) do
		values[name .. "." .. value] = take(cursor, subtree, fields[name .. "." .. value], 8, value)
	end
end

local function dissect_part(cursor, tree, name, layout)
	if left(cursor) == 0 then
		take(cursor, tree, nil, 1, name)
		return
	end
	local start = cursor.at
	local subtree = tree:add(fields[name], cursor.tvb(start))
	dissect_layout(cursor, subtree, layout, name .. ".")
	subtree:set_len(cursor.at - start)
end

-- Most of an event are registers, and most of the time nobody looks at them: neither at the message's details nor, by a
-- filter or a column, at one of these fields.
local function is_looked_at(tree, name)
	if tree.visible or tree:referenced(fields[name]) then
		return true
	end
	for _, field in ipairs(parts_of[name]) do
		if tree:referenced(field) then
			return true
		end
	end
	return false
end

local structures = {
	regs = function(cursor, tree, values)
		dissect_values(cursor, tree, "regs", registers, values)
	end,
	msrs = function(cursor, tree, values)
		dissect_values(cursor, tree, "msrs", event_msrs, values)
	end,
	sregs = function(cursor, tree)
		local start = cursor.at
		local subtree = tree:add(fields.sregs, cursor.tvb(start))
		for _, name in ipairs(segments) do
			dissect_part(cursor, subtree, "sregs." .. name, segment_layout)
		end
		for _, name in ipairs(tables) do
			dissect_part(cursor, subtree, "sregs." .. name, table_layout)
		end
		for _, name in ipairs(control) do
			take(cursor, subtree, fields["sregs." .. name], 8, name)
		end
		take(cursor, subtree, fields["sregs.interrupt_bitmap"], 32, "interrupt_bitmap")
		subtree:set_len(cursor.at - start)
	end,
}
local structure_sizes = { regs = 144, sregs = 312, msrs = 72 }
local RIP_AT = 16 * 8 -- in regs

local function dissect_structure(cursor, tree, name, values)
	local size = structure_sizes[name]
	if left(cursor) == 0 then
		take(cursor, tree, nil, 1, name)
	elseif left(cursor) < size or is_looked_at(tree, name) then
		structures[name](cursor, tree, values)
	else
		if name == "regs" then
			values["regs.rip"] = cursor.tvb(cursor.at + RIP_AT, 8)
		end
		cursor.at = cursor.at + size
	end
end

-- Dissects what a layout says; the values by name, of a repeated field the last one.
function dissect_layout(cursor, tree, layout, prefix, values)
	values = values or {}
	local fixed, each = layout:match("^(.-)each (.*)$")
	local rest
	if not fixed then
		fixed, rest = layout:match("^(.-)rest (.*)$")
	end
	for word in (fixed or layout):gmatch("%S+") do
		local name, size = word:match("^(.+):(%d+)$")
		if not name then
			dissect_structure(cursor, tree, word, values)
		elseif name == "-" then
			take(cursor, tree, nil, tonumber(size), "its padding")
		else
			values[name] = take(cursor, tree, fields[(prefix or "") .. name], tonumber(size), name) or values[name]
		end
		if cursor.ended then
			return values
		end
	end
	while each and left(cursor) > 0 and not cursor.ended do
		dissect_layout(cursor, tree, each, prefix, values)
	end
	if rest and left(cursor) > 0 then
		take(cursor, tree, fields[rest], left(cursor), rest)
	end
	return values
end

-- One line about a message.

local function hex(range)
	if range:len() > 4 then
		return "0x" .. range:le_uint64():tohex():gsub("^0+(%x)", "%1")
	end
	return string.format("0x%x", range:le_uint())
end

local shown_as = {
	vcpu = function(range)
		return "vCPU " .. range:le_uint()
	end,
	event = function(range)
		return events[range:le_uint()] or "event-" .. range:le_uint()
	end,
	checked_command = function(range)
		return commands[range:le_uint()] or "command-" .. range:le_uint()
	end,
	msr = function(range)
		return msrs[range:le_uint()] or hex(range)
	end,
	cr = function(range)
		return "cr" .. range:le_uint()
	end,
	mode = function(range)
		return "mode " .. range:le_uint()
	end,
	action = function(range)
		return actions[range:le_uint()] or "action-" .. range:le_uint()
	end,
	enable = function(range)
		return range:le_uint() == 0 and "off" or "on"
	end,
	access = function(range)
		return access[range:le_uint()] or hex(range)
	end,
	descriptor = function(range)
		return descriptors[range:le_uint()] or hex(range)
	end,
	write = function(range)
		return range:le_uint() == 0 and "read" or "write"
	end,
	memory_type = function(range)
		return memory_types[range:le_uint()] or hex(range)
	end,
	count = function(range)
		return range:le_uint() .. " pages"
	end,
	length = function(range)
		return range:le_uint64() .. " bytes"
	end,
	version = function(range)
		return "version " .. range:le_uint()
	end,
	vcpu_count = function(range)
		return range:le_uint() .. " vCPUs"
	end,
	["regs.rip"] = function(range)
		return "rip " .. hex(range)
	end,
	old = function(range)
		return hex(range)
	end,
	new = function(range)
		return "-> " .. hex(range)
	end,
}

local in_line = {
	"event", "checked_command", "vcpu", "action", "mode", "regs.rip", "cr", "msr", "old", "new", "new_val", "enable",
	"descriptor", "write", "version", "vcpu_count", "tsc_speed", "memory_type", "gfn", "count", "gva", "gpa", "length",
	"access", "vector", "error_code", "function", "index", "eax", "ebx", "ecx", "edx",
}

local function line_of(values)
	local words = {}
	for _, name in ipairs(in_line) do
		local range = values[name]
		if range then
			words[#words + 1] = shown_as[name] and shown_as[name](range) or name .. " " .. hex(range)
		end
	end
	return table.concat(words, " ")
end

-- Who answers whom: filled while Wireshark goes through the frames for the first time, in order.

local interface = Field.new("frame.interface_id")
local waiting, partner

function kvmi.init()
	waiting, partner = {}, {}
end

local function join(tree, pinfo, kind, seq, is_answer)
	if not pinfo.visited then
		local key = kind .. "/" .. seq .. "/" .. tostring(interface())
		if is_answer and waiting[key] then
			local asked = waiting[key]
			waiting[key] = nil
			local time = pinfo.rel_ts - asked.time
			partner[pinfo.number] = { frame = asked.frame, time = time }
			partner[asked.frame] = { frame = pinfo.number, time = time }
		elseif not is_answer then
			waiting[key] = { frame = pinfo.number, time = pinfo.rel_ts }
		end
	end
	local other = partner[pinfo.number]
	if other then
		tree:add(is_answer and fields.answer_to or fields.answered_in, other.frame):set_generated()
		if is_answer then
			local seconds = math.floor(other.time)
			local time = NSTime.new(seconds, math.floor((other.time - seconds) * 1e9 + 0.5))
			tree:add(fields.time, time):set_generated()
		end
	end
end

local dissectors = {}

function dissectors.event(cursor, tree)
	local start = cursor.at
	local values = dissect_layout(cursor, tree, event_layout)
	if values.size and not cursor.ended then
		local size = values.size:le_uint()
		if size > cursor.at - start then -- a newer kernel's event has more in common; its own data follow
			take(cursor, tree, fields.more, size - (cursor.at - start), "its own data")
		end
		dissect_layout(cursor, tree, own_data[values.event:le_uint()] or "", nil, values)
	end
	return values
end

function dissectors.reply(cursor, tree)
	local start = cursor.at
	local values = dissect_layout({ tvb = cursor.tvb, at = start }, tree, "vcpu:2 -:6 action:1 event:1")
	cursor.at = math.min(start + 10, cursor.tvb:len())
	cursor.may_end = true -- the kernel takes what is missing for zero
	dissect_layout(cursor, tree, "-:6", nil, values)
	dissect_layout(cursor, tree, values.event and own_reply[values.event:le_uint()] or "", nil, values)
	return values
end

local function payload_of(id)
	return commands[id] and "" or "rest data"
end

function dissectors.command(cursor, tree, id)
	return dissect_layout(cursor, tree, requests[id] or payload_of(id))
end

function dissectors.answer(cursor, tree, id)
	local range, item = take(cursor, tree, fields.error, 4, "error")
	take(cursor, tree, nil, 4, "its padding")
	if not range then
		return {}
	end
	local code = range:le_int()
	if code == 0 then
		return dissect_layout(cursor, tree, answers[id] or payload_of(id))
	end
	item:add_proto_expert_info(refused, "Refused: " .. (errors[code] or code))
	return { error = errors[code] or tostring(code) }
end

function kvmi.dissector(tvb, pinfo, tree)
	local sent, received = pinfo.p2p_dir == P2P_DIR_SENT, pinfo.p2p_dir == P2P_DIR_RECV
	pinfo.cols.protocol = "KVMI"
	pinfo.cols.src = sent and "introspector" or "kernel"
	pinfo.cols.dst = sent and "kernel" or "introspector"
	local message = tree:add(kvmi, tvb())
	local cursor = { tvb = tvb, at = 0 }
	local header = dissect_layout(cursor, message, "command:2 payload_size:2 seq:4")
	if cursor.ended then
		pinfo.cols.info = "[no whole message]"
		return cursor.at
	end
	local id, seq, size = header.command:le_uint(), header.seq:le_uint(), header.payload_size:le_uint()
	local kind = id == EVENT and "event"
		or id == EVENT_REPLY and "reply"
		or sent and "command"
		or "answer"
	if not (sent or received) or (id == EVENT and sent) or (id == EVENT_REPLY and received) then
		message:add_proto_expert_info(astray)
	end
	if size ~= left(cursor) then
		local what = string.format("%d bytes are announced, and %d are there", size, left(cursor))
		message:add_proto_expert_info(short, what)
	end
	local is_answer = kind == "reply" or kind == "answer"
	join(message, pinfo, id <= EVENT and "event" or id, seq, is_answer)
	local values = dissectors[kind](cursor, message, id)
	if left(cursor) > 0 and not cursor.ended then
		local item = message:add(fields.more, tvb(cursor.at))
		item:add_proto_expert_info(long)
	end
	local name = commands[id] or "command-" .. id
	local error, line = values.error, nil
	values.error = nil
	line = line_of(values)
	if kind == "answer" then
		line = error and "-" .. error or (line == "" and "ok" or line)
	end
	local title = (kind == "answer" and "answer of " or "") .. name
	pinfo.cols.info = string.format("%s %u%s", title, seq, line == "" and "" or ": " .. line)
	message:append_text(string.format(", %s %u", title, seq))
	return tvb:len()
end
