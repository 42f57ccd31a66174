//! Modules with configurable answers, generated as text.

/// The behaviour of one of a module's hooks.
pub struct Hook {
    /// The export, such as `on_request_body`.
    pub name: &'static str,
    /// Searched for in the input, byte by byte. An empty needle is always found.
    pub needle: &'static str,
    /// The answer if the needle is found.
    pub found: Answer,
    /// The answer otherwise.
    pub otherwise: Answer,
}

/// The result of a hook.
#[derive(Clone, Copy)]
pub enum Answer {
    /// Returns this JSON.
    Json(&'static str),
    /// Returns 0, no opinion.
    Nothing,
    /// Traps.
    Trap,
    /// Never returns.
    Loop,
}

impl Hook {
    /// A hook that always answers with `json`.
    pub fn always(name: &'static str, json: &'static str) -> Self {
        Self { name, needle: "", found: Answer::Json(json), otherwise: Answer::Nothing }
    }

    /// A hook that gives the answer `found` if its input contains `needle`, and else no opinion.
    pub fn when(name: &'static str, needle: &'static str, found: Answer) -> Self {
        Self { name, needle, found, otherwise: Answer::Nothing }
    }
}

/// Constants are below this address, and the input above.
const INPUT: usize = 1 << 16;

/// A module with these hooks. Every input is written to the same place, so calls do not use up
/// memory.
pub fn module(hooks: &[Hook]) -> Vec<u8> {
    let mut data = Data { next: 16, text: String::new() };
    let mut functions = String::new();
    for hook in hooks {
        let needle = data.put(hook.needle);
        let found = data.answer(hook.found);
        let otherwise = data.answer(hook.otherwise);
        functions.push_str(&format!(
            r#"(func (export "{}") (param i32 i32) (result i64)
                (if (result i64)
                    (call $contains (local.get 0) (local.get 1) (i32.const {needle}) (i32.const {}))
                    (then {found}) (else {otherwise})))
            "#,
            hook.name,
            hook.needle.len(),
        ));
    }
    assert!(data.next < INPUT, "the answers are too large");
    let text = format!(
        r#"(module
            (memory (export "memory") 64)
            (func (export "alloc") (param i32) (result i32) (i32.const {INPUT}))
            (func (export "dealloc") (param i32 i32))
            (func $contains (param $input i32) (param $length i32) (param $needle i32) (param $size i32) (result i32)
                (local $last i32) (local $i i32)
                (if (i32.lt_s (local.get $length) (local.get $size)) (then (return (i32.const 0))))
                (local.set $last (i32.sub (i32.add (local.get $input) (local.get $length)) (local.get $size)))
                (loop $next
                    (local.set $i (i32.const 0))
                    (block $differs
                        (loop $same
                            (if (i32.eq (local.get $i) (local.get $size)) (then (return (i32.const 1))))
                            (br_if $differs (i32.ne
                                (i32.load8_u (i32.add (local.get $input) (local.get $i)))
                                (i32.load8_u (i32.add (local.get $needle) (local.get $i)))))
                            (local.set $i (i32.add (local.get $i) (i32.const 1)))
                            (br $same)))
                    (local.set $input (i32.add (local.get $input) (i32.const 1)))
                    (br_if $next (i32.le_s (local.get $input) (local.get $last))))
                (i32.const 0))
            {functions}
            {})"#,
        data.text
    );
    wat::parse_str(text).expect("the module's text is invalid")
}

struct Data {
    next: usize,
    text: String,
}

impl Data {
    fn put(&mut self, bytes: &str) -> usize {
        let at = self.next;
        let escaped: String = bytes.bytes().map(|byte| format!("\\{byte:02x}")).collect();
        self.text.push_str(&format!("(data (i32.const {at}) \"{escaped}\")\n"));
        self.next += bytes.len();
        at
    }

    fn answer(&mut self, answer: Answer) -> String {
        match answer {
            Answer::Json(json) => format!("(i64.const {})", (self.put(json) as u64) << 32 | json.len() as u64),
            Answer::Nothing => "(i64.const 0)".to_owned(),
            Answer::Trap => "(unreachable)".to_owned(),
            Answer::Loop => "(loop $forever (br $forever)) (i64.const 0)".to_owned(),
        }
    }
}
