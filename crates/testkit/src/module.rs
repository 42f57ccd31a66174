//! Guest modules for tests in the text format, each as small as its behaviour allows.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Every hook of an ordinary request.
pub const PAGE_HOOKS: [&str; 4] = ["on_request_headers", "on_request_body", "on_response_headers", "on_response_body"];

/// Address of the input, which may be up to 60 pages long.
const INPUT: u32 = 64 << 10;

/// Address at which answers that depend on the input are built.
const OUTPUT: u32 = 4 << 20;

/// Translates the text format into the binary format.
#[track_caller]
pub fn encode(wat: &str) -> Vec<u8> {
    wat::parse_str(wat).unwrap_or_else(|error| panic!("{error}\n{wat}"))
}

/// Writes the binary format of `wat` to `directory/name`. The file is renamed into place, so a
/// watcher never sees a part of it.
#[track_caller]
pub fn write(directory: &Path, name: &str, wat: &str) -> PathBuf {
    let bytes = encode(wat);
    let path = directory.join(name);
    let unfinished = directory.join(format!("{name}.tmp"));
    std::fs::write(&unfinished, bytes).unwrap();
    std::fs::rename(unfinished, &path).unwrap();
    path
}

/// The text of a module in `fixtures/hostile`. A fixture that is not a whole module is one way to
/// misbehave, to be put into `frame.wat`. A line after `;; n TIMES` is repeated `n` times.
#[track_caller]
pub fn hostile(name: &str) -> String {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/hostile"));
    let read = |name: &str| {
        let path = folder.join(name).with_extension("wat");
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read `{}`: {error}", path.display()))
    };
    let text = read(name);
    let text = if text.contains("(module") { text } else { read("frame").replace(";; MISBEHAVIOUR", &text) };
    let (mut whole, mut times) = (String::new(), 1);
    for line in text.lines() {
        let line = format!("{line}\n");
        whole.push_str(&line.repeat(times));
        let announced = line.trim().strip_prefix(";; ").and_then(|rest| rest.strip_suffix(" TIMES"));
        times = announced.map_or(1, |times| times.parse().unwrap());
    }
    whole
}

/// A module with `hooks`, each with the body that `code` returns for it, and with `more` items.
/// In a body, `$ptr` and `$len` are the address and length of the input.
pub fn with_hooks(hooks: &[&str], code: impl Fn(&str) -> String, more: &str) -> String {
    let mut wat = format!(
        r#"(module {more}
        (memory (export "memory") 192)
        (func (export "alloc") (param i32) (result i32) i32.const {INPUT})
        (func (export "dealloc") (param i32 i32))"#
    );
    for hook in hooks {
        let code = code(hook);
        let _ = write!(wat, "\n(func (export \"{hook}\") (param $ptr i32) (param $len i32) (result i64) {code})");
    }
    wat + ")"
}

/// A data segment with `text` at the address `at`, and the result that points to it.
fn text(at: usize, text: &str) -> (String, String) {
    let bytes: String = text.bytes().map(|byte| format!("\\{byte:02x}")).collect();
    let result = (at as u64) << 32 | text.len() as u64;
    (format!("(data (i32.const {at}) \"{bytes}\")"), format!("i64.const {result}"))
}

/// A module that answers every event of `hooks` with the same JSON.
pub fn answering(hooks: &[&str], json: &str) -> String {
    let (data, result) = text(1024, json);
    with_hooks(hooks, |_| result.clone(), &data)
}

/// A module that allows every request with this tag, which identifies the module.
pub fn tagging(tag: &str) -> String {
    answering(&["on_request_headers"], &format!(r#"{{"decision":"allow","tags":["{tag}"]}}"#))
}

/// A function `$quote` whose result is the input, escaped as a JSON string, between the texts
/// `before` and `after`.
fn quoting(before: &str, after: &str) -> String {
    let (before_data, _) = text(1024, before);
    let (after_data, _) = text(2048, after);
    let (before, after) = (before.len(), after.len());
    format!(
        r#"{before_data} {after_data}
        (func $quote (param $ptr i32) (param $len i32) (result i64)
            (local $end i32) (local $out i32) (local $byte i32)
            (memory.copy (i32.const {OUTPUT}) (i32.const 1024) (i32.const {before}))
            (local.set $out (i32.const {start}))
            (local.set $end (i32.add (local.get $ptr) (local.get $len)))
            (block $done (loop $next
                (br_if $done (i32.ge_u (local.get $ptr) (local.get $end)))
                (local.set $byte (i32.load8_u (local.get $ptr)))
                (if (i32.or (i32.eq (local.get $byte) (i32.const 34)) (i32.eq (local.get $byte) (i32.const 92)))
                    (then
                        (i32.store8 (local.get $out) (i32.const 92))
                        (local.set $out (i32.add (local.get $out) (i32.const 1)))))
                (i32.store8 (local.get $out) (local.get $byte))
                (local.set $out (i32.add (local.get $out) (i32.const 1)))
                (local.set $ptr (i32.add (local.get $ptr) (i32.const 1)))
                (br $next)))
            (memory.copy (local.get $out) (i32.const 2048) (i32.const {after}))
            (local.set $out (i32.add (local.get $out) (i32.const {after})))
            (i64.or
                (i64.const {high})
                (i64.extend_i32_u (i32.sub (local.get $out) (i32.const {OUTPUT})))))"#,
        start = OUTPUT as usize + before,
        high = u64::from(OUTPUT) << 32,
    )
}

/// A module that allows everything and returns its input as `routing_metadata.event`.
pub fn echo(hooks: &[&str]) -> String {
    let more = quoting(r#"{"routing_metadata":{"event":""#, r#""}}"#);
    with_hooks(hooks, |_| "(call $quote (local.get $ptr) (local.get $len))".into(), &more)
}

/// A module that blocks everything and returns its input as the body of the block, because gRPC
/// carries no routing metadata.
pub fn revealing(hooks: &[&str]) -> String {
    let more = quoting(r#"{"decision":"block","body":""#, r#""}"#);
    with_hooks(hooks, |_| "(call $quote (local.get $ptr) (local.get $len))".into(), &more)
}

/// The input that an [`echo`] returned.
#[track_caller]
pub fn seen(answer: &serde_json::Value) -> serde_json::Value {
    let event = answer["routing_metadata"]["event"].as_str().unwrap_or_else(|| panic!("no event in {answer}"));
    serde_json::from_str(event).unwrap_or_else(|error| panic!("{error}: {event}"))
}

/// The import and function that [`waiting`] needs. They use the memory at address 16.
const CLOCK: &str = r#"(import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
    (func $now (result i64)
        (drop (call $clock (i32.const 1) (i64.const 1) (i32.const 16)))
        (i64.load (i32.const 16)))"#;

/// Code that spins for some time. It needs a local `$until`.
fn waiting(milliseconds: u64) -> String {
    let nanoseconds = milliseconds * 1_000_000;
    format!(
        "(local.set $until (i64.add (call $now) (i64.const {nanoseconds})))
        (loop $wait (br_if $wait (i64.lt_u (call $now) (local.get $until))))"
    )
}

/// A module that spins for some time on every request and then allows it with a tag.
pub fn busy(milliseconds: u64, tag: &str) -> String {
    let (data, result) = text(1024, &format!(r#"{{"decision":"allow","tags":["{tag}"]}}"#));
    let wait = waiting(milliseconds);
    with_hooks(&["on_request_headers"], |_| format!("(local $until i64) {wait} {result}"), &format!("{CLOCK} {data}"))
}

/// A module that spins for some time on a GET of `/r…` and then returns `refusal`. On anything else
/// it is an [`echo`].
pub fn refusing_some(milliseconds: u64, refusal: &str) -> String {
    let (data, result) = text(3072, refusal);
    let more = format!("{CLOCK} {data} {}", quoting(r#"{"routing_metadata":{"event":""#, r#""}}"#));
    let first = r#"{"method":"GET","uri":"/"#.len();
    let wait = waiting(milliseconds);
    let code = format!(
        "(if (i32.eq (local.get $choice) (i32.const {refused})) (then {wait} (return ({result}))))
        (call $quote (local.get $ptr) (local.get $len))",
        refused = b'r',
    );
    let choice = format!("(local $until i64) (local $choice i32) (local.set $choice (i32.load8_u offset={first} (local.get $ptr)))");
    with_hooks(&["on_request_headers", "on_response_headers"], |_| format!("{choice} {code}"), &more)
}

/// A module that traps on a GET of `/t…`, loops forever on `/l…`, and allows anything else.
pub fn choosing() -> String {
    // {"method":"GET","uri":"/X
    let at = r#"{"method":"GET","uri":"/"#.len();
    let code = format!(
        r#"(local $choice i32)
        (local.set $choice (i32.load8_u (i32.add (local.get $ptr) (i32.const {at}))))
        (if (i32.eq (local.get $choice) (i32.const {trap})) (then unreachable))
        (if (i32.eq (local.get $choice) (i32.const {spin})) (then (loop $ever (br $ever))))
        i64.const 0"#,
        trap = b't',
        spin = b'l',
    );
    with_hooks(&["on_request_headers"], |_| code.clone(), "")
}

/// A module that blocks a GET of `/b…`, and allows anything else with the tag `good`, `/s…` after a
/// short loop.
pub fn judging() -> String {
    let first = r#"{"method":"GET","uri":"/"#.len();
    let more = r#"
        (data (i32.const 16) "{\"tags\":[\"good\"]}")
        (data (i32.const 64) "{\"decision\":\"block\"}")"#;
    let code = format!(
        r#"(local $choice i32) (local $left i32)
        (local.set $choice (i32.load8_u offset={first} (local.get $ptr)))
        (if (i32.eq (local.get $choice) (i32.const {block})) (then (return (i64.const 0x40_00000014))))
        (if (i32.eq (local.get $choice) (i32.const {slow}))
            (then
                (local.set $left (i32.const 3000000))
                (loop $again (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))))
        (i64.const 0x10_00000011)"#,
        block = b'b',
        slow = b's',
    );
    with_hooks(&["on_request_headers", "on_request_body", "on_response_headers"], |_| code.clone(), more)
}

/// One of eight sequences that a client sends to a [`judging`] module under one id. Only the last
/// event must be answered.
pub fn twins(at: usize) -> &'static [&'static str] {
    match at % 8 {
        0 => &["/allowed", "/blocked"],
        1 => &["/blocked", "/allowed"],
        2 => &["/slow", "/blocked"],
        3 => &["/blocked", "/slow"],
        4 => &["/allowed", "/allowed", "/slow", "/blocked"],
        5 => &["/slow", "cancel", "/blocked"],
        6 => &["/allowed", "cancel", "/blocked"],
        _ => &["/blocked", "cancel", "/allowed"],
    }
}

/// A module that logs `line` at info level through `zentinel.log` on every request.
pub fn logging(line: &str) -> String {
    let (data, _) = text(1024, line);
    let more = format!(r#"(import "zentinel" "log" (func $log (param i32 i32 i32))) {data}"#);
    let code = format!("(call $log (i32.const 2) (i32.const 1024) (i32.const {})) i64.const 0", line.len());
    with_hooks(&["on_request_headers"], |_| code.clone(), &more)
}

/// A module that calls the imports of AssemblyScript: `console`, `trace`, clocks and `seed`. It
/// traps when a result is implausible.
pub fn assemblyscript() -> String {
    let mut more = String::new();
    for name in ["log", "debug", "info", "warn", "error", "time", "timeLog", "timeEnd"] {
        let _ = write!(more, r#"(import "env" "console.{name}" (func ${name} (param i32)))"#);
    }
    more += r#"(import "env" "console.assert" (func $assert (param i32 i32)))
        (import "env" "trace" (func $trace (param i32 i32 f64 f64 f64 f64 f64)))
        (import "env" "seed" (func $seed (result f64)))
        (import "env" "Date.now" (func $date (result f64)))
        (import "env" "performance.now" (func $now (result f64)))
        (import "env" "process.exit" (func $exit (param i32)))
        (func $check (param i32) (if (i32.eqz (local.get 0)) (then (unreachable))))"#;
    // "hi ü😀" in UTF-16, after its length in bytes.
    more += r#"(data (i32.const 1024) "\0c\00\00\00h\00i\00 \00\fc\00\3d\d8\00\de")"#;
    let code = "
        (call $log (i32.const 1028)) (call $debug (i32.const 1028)) (call $info (i32.const 1028))
        (call $warn (i32.const 1028)) (call $error (i32.const 1028))
        (call $assert (i32.const 1) (i32.const 1028)) (call $assert (i32.const 0) (i32.const 1028))
        (call $trace (i32.const 1028) (i32.const 2) (f64.const 1.5) (f64.const 2) (f64.const 3) (f64.const 3) (f64.const 3))
        (call $time (i32.const 1028)) (call $timeLog (i32.const 1028)) (call $timeEnd (i32.const 1028)) (call $timeEnd (i32.const 1028))
        (call $check (f64.ne (call $seed) (call $seed)))
        (call $check (f64.gt (call $date) (f64.const 1.6e12)))
        (call $check (f64.le (call $now) (call $now)))
        (if (i32.eq (i32.load8_u offset=11 (local.get $ptr)) (i32.const 0x45)) (then (call $exit (i32.const 3))))
        (i64.const 0)";
    with_hooks(&["on_request_headers"], |_| code.into(), &more)
}

/// A module that returns the configuration of its instance as `routing_metadata.event`, and rejects
/// configurations with a `!`.
pub fn configurable() -> String {
    let (error, refusal) = text(3072, r#"{"error":"no exclamation marks"}"#);
    let more = quoting(r#"{"routing_metadata":{"event":""#, r#""}}"#) + &error + "(global $len (mut i32) (i32.const 0))";
    with_hooks(
        &["on_request_headers", "on_configure"],
        |hook| {
            const KEPT: u32 = 8 << 20;
            if hook == "on_request_headers" {
                return format!("(call $quote (i32.const {KEPT}) (global.get $len))");
            }
            format!(
                r#"(local $at i32)
                (loop $next
                    (if (i32.lt_u (local.get $at) (local.get $len)) (then
                        (if (i32.eq (i32.load8_u (i32.add (local.get $ptr) (local.get $at))) (i32.const {mark})) (then ({refusal}) return))
                        (local.set $at (i32.add (local.get $at) (i32.const 1)))
                        (br $next))))
                (memory.copy (i32.const {KEPT}) (local.get $ptr) (local.get $len))
                (global.set $len (local.get $len))
                i64.const 0"#,
                mark = b'!',
            )
        },
        &more,
    )
}

/// A module that tags its answers with the number of calls of its instance so far, up to 9.
pub fn counting() -> String {
    const DIGIT: usize = 1024 + r#"{"tags":[""#.len();
    let (data, result) = text(1024, r#"{"tags":["0"]}"#);
    let code = format!("(i32.store8 (i32.const {DIGIT}) (i32.add (i32.load8_u (i32.const {DIGIT})) (i32.const 1))) {result}");
    with_hooks(&["on_request_headers"], |_| code.clone(), &data)
}

/// The number of calls in the answer of a [`counting`] module.
#[track_caller]
pub fn count(answer: &serde_json::Value) -> u32 {
    answer["audit"]["tags"][0].as_str().unwrap_or_else(|| panic!("no count in {answer}")).parse().unwrap()
}

/// A module that replaces every run of 16 digits in a request's body with `*`, and blocks a body
/// that begins with `!`. It sees one chunk at a time, so it misses a number that spans two chunks.
pub fn masking() -> String {
    let (before, _) = text(1024, r#"{"request_body_mutation":{"action":"replace","data":""#);
    let (after, _) = text(2048, r#""}}"#);
    let (refusal, refuse) = text(3072, r#"{"decision":"block","status":422,"needs_more":true}"#);
    let key = r#""body":""#;
    let (key_data, _) = text(4096, key);
    let (before_len, after_len, key_len) = (r#"{"request_body_mutation":{"action":"replace","data":""#.len(), r#""}}"#.len(), key.len());
    let out = OUTPUT as usize + before_len;
    let high = u64::from(OUTPUT) << 32;
    // The value of `body` is copied with its escapes, up to the closing quote, and masked in place.
    let code = format!(
        r#"(local $end i32) (local $out i32) (local $byte i32) (local $run i32) (local $at i32)
        (local.set $end (i32.add (local.get $ptr) (local.get $len)))
        (block $found (loop $look
            (if (i32.ge_u (local.get $ptr) (local.get $end)) (then (return (i64.const 0))))
            (br_if $found (i64.eq (i64.load (local.get $ptr)) (i64.load (i32.const 4096))))
            (local.set $ptr (i32.add (local.get $ptr) (i32.const 1)))
            (br $look)))
        (local.set $ptr (i32.add (local.get $ptr) (i32.const {key_len})))
        (if (i32.eq (i32.load8_u (local.get $ptr)) (i32.const 33)) (then (return ({refuse}))))
        (memory.copy (i32.const {OUTPUT}) (i32.const 1024) (i32.const {before_len}))
        (local.set $out (i32.const {out}))
        (block $done (loop $next
            (local.set $byte (i32.load8_u (local.get $ptr)))
            (br_if $done (i32.eq (local.get $byte) (i32.const 34)))
            (if (i32.eq (local.get $byte) (i32.const 92)) (then
                (i32.store8 (local.get $out) (local.get $byte))
                (local.set $out (i32.add (local.get $out) (i32.const 1)))
                (local.set $ptr (i32.add (local.get $ptr) (i32.const 1)))
                (local.set $byte (i32.load8_u (local.get $ptr)))))
            (i32.store8 (local.get $out) (local.get $byte))
            (local.set $out (i32.add (local.get $out) (i32.const 1)))
            (local.set $ptr (i32.add (local.get $ptr) (i32.const 1)))
            (if (i32.lt_u (i32.sub (local.get $byte) (i32.const 48)) (i32.const 10))
                (then
                    (local.set $run (i32.add (local.get $run) (i32.const 1)))
                    (if (i32.eq (local.get $run) (i32.const 16)) (then
                        (memory.fill (i32.sub (local.get $out) (i32.const 16)) (i32.const 42) (i32.const 16))
                        (local.set $run (i32.const 0)))))
                (else (local.set $run (i32.const 0))))
            (br $next)))
        (memory.copy (local.get $out) (i32.const 2048) (i32.const {after_len}))
        (i64.or (i64.const {high})
            (i64.extend_i32_u (i32.sub (i32.add (local.get $out) (i32.const {after_len})) (i32.const {OUTPUT}))))"#
    );
    with_hooks(&["on_request_body"], |_| code.clone(), &format!("{before} {after} {refusal} {key_data}"))
}
