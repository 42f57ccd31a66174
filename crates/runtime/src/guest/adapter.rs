//! A small module between the host and the guest, so a call enters Wasm only once.
//!
//! Entering Wasm on a fibre costs about 1 µs, and a call consists of four calls: `alloc`, the hook,
//! and `dealloc` twice. The adapter makes all four inside Wasm, and calls the host back to write
//! the input and to read the result. For each hook it exports, under the hook's name,
//!
//! ```text
//! (func (param $len i32)
//!   $ptr = alloc($len); put($ptr); $result = hook($ptr, $len); dealloc($ptr, $len); take($result);
//!   if low($result) != 0 { dealloc(high($result), low($result)) })
//! ```

use wasm_encoder::{
    BlockType, CodeSection, EntityType, ExportKind, ExportSection, Function, FunctionSection, ImportSection, Module, TypeSection, ValType,
};
use wasmtime::{Caller, Linker, Result};
use zentinel_wasm_contract::{FailureKind, Hooks};

use crate::host::state::HostState;
use crate::memory::{slice, slice_mut};

/// Imports of the adapter before the hooks, in this order.
pub(crate) const IMPORTS: [&str; 4] = ["alloc", "dealloc", "put", "take"];

const ALLOC: u32 = 0;
const DEALLOC: u32 = 1;
const PUT: u32 = 2;
const TAKE: u32 = 3;

/// The adapter for a module that exports `hooks`. It imports [`IMPORTS`] and then the hooks, in
/// their order.
pub(crate) fn module(hooks: Hooks) -> Vec<u8> {
    let hooks: Vec<_> = hooks.iter().collect();

    let mut types = TypeSection::new();
    types.ty().function([ValType::I32], [ValType::I32]);
    types.ty().function([ValType::I32, ValType::I32], []);
    types.ty().function([ValType::I32], []);
    types.ty().function([ValType::I64], []);
    types.ty().function([ValType::I32, ValType::I32], [ValType::I64]);
    let [alloc_type, dealloc_type, len_type, take_type, hook_type] = [0, 1, 2, 3, 4];

    let mut imports = ImportSection::new();
    for (name, ty) in IMPORTS.iter().zip([alloc_type, dealloc_type, len_type, take_type]) {
        imports.import("", name, EntityType::Function(ty));
    }
    for hook in &hooks {
        imports.import("", hook.export(), EntityType::Function(hook_type));
    }

    let first_hook = IMPORTS.len() as u32;
    let first_function = first_hook + hooks.len() as u32;
    let mut functions = FunctionSection::new();
    let mut exports = ExportSection::new();
    let mut code = CodeSection::new();
    for (at, hook) in hooks.iter().enumerate() {
        let at = at as u32;
        functions.function(len_type);
        exports.export(hook.export(), ExportKind::Func, first_function + at);
        code.function(&function(first_hook + at));
    }

    let mut module = Module::new();
    module.section(&types).section(&imports).section(&functions).section(&exports).section(&code);
    module.finish()
}

fn function(hook: u32) -> Function {
    let [len, ptr, result, result_len] = [0, 1, 2, 3];
    let mut function = Function::new([(1, ValType::I32), (1, ValType::I64), (1, ValType::I32)]);
    function
        .instructions()
        .local_get(len)
        .call(ALLOC)
        .local_tee(ptr)
        .call(PUT)
        .local_get(ptr)
        .local_get(len)
        .call(hook)
        .local_set(result)
        .local_get(ptr)
        .local_get(len)
        .call(DEALLOC)
        .local_get(result)
        .call(TAKE)
        .local_get(result)
        .i32_wrap_i64()
        .local_tee(result_len)
        .if_(BlockType::Empty)
        .local_get(result)
        .i64_const(32)
        .i64_shr_u()
        .i32_wrap_i64()
        .local_get(result_len)
        .call(DEALLOC)
        .end()
        .end();
    function
}

/// Defines the host functions that the adapter imports.
pub(crate) fn define(linker: &mut Linker<HostState>) -> Result<()> {
    linker.func_wrap("", "put", put)?;
    linker.func_wrap("", "take", take)?;
    Ok(())
}

/// Writes the input to the memory that `alloc` returned.
fn put(mut caller: Caller<'_, HostState>, ptr: i32) -> Result<()> {
    let (memory, state) = HostState::memory(&mut caller)?;
    let input = &state.exchange.json().input;
    if ptr != 0
        && let Some(target) = slice_mut(memory, ptr, input.len() as u32)
    {
        target.copy_from_slice(input);
        return Ok(());
    }
    let (len, kind) = (input.len(), if state.growth_refused { FailureKind::MemoryLimit } else { FailureKind::AllocFailed });
    Err(state.fail(kind, format!("`alloc({len})` returned {}, but the module has no {len} bytes of memory there", ptr.cast_unsigned())))
}

/// Copies the answer to which the hook's result points. A length of 0 means "no opinion".
fn take(mut caller: Caller<'_, HostState>, packed: i64) -> Result<()> {
    let (memory, state) = HostState::memory(&mut caller)?;
    let packed = packed.cast_unsigned();
    let (ptr, len) = ((packed >> 32) as u32, packed as u32);
    if len == 0 {
        return Ok(());
    }
    if len as usize > state.limits.output {
        let limit = state.limits.output;
        return Err(
            state.fail(FailureKind::OutputLimit, format!("its answer has {len} bytes, the limit is {limit}: raise `--max-output-bytes`"))
        );
    }
    match slice(memory, ptr.cast_signed(), len) {
        Some(result) if ptr != 0 => {
            state.exchange.json_mut().output.extend_from_slice(result);
            Ok(())
        }
        _ => {
            Err(state
                .fail(FailureKind::InvalidResult, format!("it returned an answer of {len} bytes at {ptr}, which is outside its memory")))
        }
    }
}
