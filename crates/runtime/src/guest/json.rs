//! The JSON interface of the product page: hooks take and return JSON objects in linear memory.

use wasmtime::{Engine, ExternType, Linker, Module, ModuleExport, Result, Store, TypedFunc};
use zentinel_wasm_contract::{Answer, Event, Failure, FailureKind, Hook, Hooks};
use zentinel_wasm_guest_json::{answer, input};

use super::call::{RequestContext, View};
use super::exchange::JsonExchange;
use super::{adapter, buffers};
use crate::host::state::HostState;
use crate::inspect::check_function;

/// Largest answer of `on_configure`, in bytes: it holds a reason and nothing else. It is read on
/// the thread of the call, after the last check of the deadline.
const MAX_CONFIGURED: usize = 64 << 10;

/// A module's exports, and the adapter through which they are called.
pub(crate) struct JsonInterface {
    /// Asked for several times per event.
    hooks: Hooks,
    hook_exports: Vec<(Hook, ModuleExport)>,
    alloc: ModuleExport,
    dealloc: ModuleExport,
    adapter: Module,
    linker: Linker<HostState>,
}

impl JsonInterface {
    /// Checks the exports of `module`.
    pub(crate) fn of(engine: &Engine, module: &Module, max_memory: usize, problems: &mut Vec<String>) -> Option<Self> {
        let before = problems.len();
        let hooks = check_exports(module, max_memory, problems);
        if problems.len() > before {
            return None;
        }
        let hook_exports = hooks.iter().filter_map(|hook| Some((hook, module.get_export_index(hook.export())?))).collect();
        let (alloc, dealloc) = (module.get_export_index("alloc")?, module.get_export_index("dealloc")?);
        match adapter_of(engine, hooks) {
            Ok((adapter, linker)) => Some(Self { hooks, hook_exports, alloc, dealloc, adapter, linker }),
            Err(error) => {
                problems.push(format!("cannot create the adapter: {error:#}"));
                None
            }
        }
    }

    pub(crate) fn hooks(&self) -> Hooks {
        self.hooks
    }

    pub(crate) async fn bind(&self, store: &mut Store<HostState>, instance: &wasmtime::Instance) -> Result<JsonFunctions> {
        let mut export =
            |at: &ModuleExport| instance.get_module_export(&mut *store, at).ok_or_else(|| wasmtime::Error::msg("missing export"));
        let (alloc, dealloc) = (export(&self.alloc)?, export(&self.dealloc)?);
        let hooks: Vec<_> = self.hook_exports.iter().map(|(_, at)| export(at)).collect::<Result<_>>()?;
        let (put, take) = (self.linker.get(&mut *store, "", "put")?, self.linker.get(&mut *store, "", "take")?);
        let mut imports = vec![alloc, dealloc, put, take];
        imports.extend(hooks);
        let adapter = wasmtime::Instance::new_async(&mut *store, &self.adapter, &imports).await?;
        let mut functions = JsonFunctions::default();
        for (hook, _) in &self.hook_exports {
            functions.0[*hook as usize] = Some(adapter.get_typed_func(&mut *store, hook.export())?);
        }
        Ok(functions)
    }
}

fn adapter_of(engine: &Engine, hooks: Hooks) -> Result<(Module, Linker<HostState>)> {
    let adapter = Module::new(engine, adapter::module(hooks))?;
    let mut linker = Linker::new(engine);
    adapter::define(&mut linker)?;
    Ok((adapter, linker))
}

fn check_exports(module: &Module, max_memory: usize, problems: &mut Vec<String>) -> Hooks {
    match module.get_export("memory") {
        Some(ExternType::Memory(memory)) if memory.is_shared() || memory.is_64() => {
            problems.push("its export `memory` must be a 32-bit memory that is not shared: build for `wasm32` and without threads".into());
        }
        Some(ExternType::Memory(memory)) => {
            let initial = memory.minimum().saturating_mul(memory.page_size());
            if initial > max_memory as u64 {
                problems.push(format!(
                    "it starts with {initial} bytes of memory, more than the limit of {max_memory}: raise `--max-memory-mb`"
                ));
            }
        }
        Some(_) => problems.push("its export `memory` is not a memory: rename it".into()),
        None => problems.push("it does not export `memory`: link it without `--import-memory` and `--no-export-memory`".into()),
    }
    check_function(module, "alloc", "(i32) -> i32", true, problems);
    check_function(module, "dealloc", "(i32, i32) -> ()", true, problems);
    check_function(module, "_initialize", "() -> ()", false, problems);
    let hooks: Hooks =
        Hook::ALL.into_iter().filter(|hook| check_function(module, hook.export(), "(i32, i32) -> i64", false, problems)).collect();
    // A hook of the wrong type counts as a hook, because its own message is enough.
    if !Hook::HANDLERS.iter().any(|hook| module.get_export(hook.export()).is_some()) {
        if module.get_export("_start").is_some() {
            problems.push(
                "it is a command with `_start`: build a reactor, for Go with `-buildmode=c-shared`, for C with `-mexec-model=reactor`, for Rust as a `cdylib`"
                    .into(),
            );
        } else {
            let names: Vec<_> = Hook::HANDLERS.iter().map(|hook| format!("`{hook}`")).collect();
            problems.push(format!(
                "it exports none of {}: export a hook with the type (i32, i32) -> i64, in Rust from a `cdylib`",
                names.join(", ")
            ));
        }
    }
    hooks
}

/// Writes the object of an event.
///
/// # Errors
///
/// The body is over the limit or invalid base64.
pub(crate) fn prepare(view: &View<'_>) -> Result<Vec<u8>, Failure> {
    let View { event, context, header_case: case, max_body: limit } = *view;
    let context = context.map(|context| match context {
        RequestContext::Json(context) => context,
        #[cfg(test)]
        RequestContext::Verdict => unreachable!("the context is that of another module"),
    });
    let mut out = buffers::take();
    match event {
        Event::RequestHeaders(event) => input::request(&mut out, event, case),
        Event::RequestBody(chunk) => input::request_body(&mut out, chunk, context, limit)?,
        Event::ResponseHeaders(event) => input::response(&mut out, event, context, case),
        Event::ResponseBody(chunk) => input::response_body(&mut out, chunk, context, limit)?,
        Event::WebsocketFrame(frame) => input::websocket_frame(&mut out, frame, limit)?,
        Event::GuardrailInspect(event) => input::guardrail_inspect(&mut out, event, limit)?,
        Event::RequestComplete(event) => input::request_complete(&mut out, event),
    }
    Ok(out)
}

/// Why the module rejects its configuration, if it does.
///
/// # Errors
///
/// The answer is too large or invalid.
pub(crate) fn configured(exchange: &JsonExchange) -> Result<Option<String>, Failure> {
    let len = exchange.output.len();
    if len > MAX_CONFIGURED {
        let detail = format!("the answer of `{}` has {len} bytes, the limit is {MAX_CONFIGURED}", Hook::Configure);
        return Err(Failure::new(FailureKind::OutputLimit, detail));
    }
    Ok(answer::read_configured(&exchange.output)?)
}

/// Reads the answer of the last call.
///
/// # Errors
///
/// It breaks a rule of the contract.
pub(crate) fn answer(exchange: &JsonExchange) -> Result<Answer<'_>, Failure> {
    Ok(answer::read(&exchange.output)?)
}

/// The adapter's functions of one instance, by hook.
#[derive(Default)]
pub(crate) struct JsonFunctions([Option<TypedFunc<i32, ()>>; Hook::ALL.len()]);

impl JsonFunctions {
    /// Calls a hook with `input`. The answer is in the exchange afterwards.
    pub(crate) async fn call(&self, store: &mut Store<HostState>, hook: Hook, input: Vec<u8>) -> Result<()> {
        let state = store.data_mut();
        let Some(function) = &self.0[hook as usize] else {
            return Err(state.fail(FailureKind::Trap, format!("the module does not export `{hook}`")));
        };
        let Ok(len) = i32::try_from(input.len()) else {
            return Err(state.fail(FailureKind::BodyLimit, format!("the input of `{hook}` has {} bytes", input.len())));
        };
        let exchange = state.exchange.json_mut();
        exchange.input = input;
        exchange.output.clear();
        function.call_async(store, len).await
    }
}
