//! A second kind of guest, for the tests: `decide() -> i32` refuses a request with a status, or
//! allows it with 0. It has no memory, no input and no context, so it shows that nothing outside
//! this folder depends on the JSON interface.

use wasmtime::{Module, ModuleExport, Result, Store, TypedFunc};
use zentinel_wasm_contract::{Answer, BlockStatus, Decision, Failure, FailureKind, Hook};

use super::exchange::GuestExchange;
use crate::host::state::HostState;

/// The hooks of every guest of this kind.
pub(crate) const HOOKS: [Hook; 1] = [Hook::RequestHeaders];

pub(crate) struct VerdictInterface(ModuleExport);

impl VerdictInterface {
    pub(crate) fn of(module: &Module) -> Option<Self> {
        module.get_export_index("decide").map(Self)
    }

    pub(crate) fn bind(&self, store: &mut Store<HostState>, instance: &wasmtime::Instance) -> Result<VerdictFunction> {
        let function = instance.get_module_export(&mut *store, &self.0).and_then(wasmtime::Extern::into_func);
        let function = function.ok_or_else(|| wasmtime::Error::msg("`decide` is not a function"))?;
        function.typed(&*store).map(VerdictFunction)
    }
}

pub(crate) struct VerdictFunction(TypedFunc<(), i32>);

impl VerdictFunction {
    pub(crate) async fn call(&self, store: &mut Store<HostState>) -> Result<()> {
        let status = self.0.call_async(&mut *store, ()).await?;
        store.data_mut().exchange = GuestExchange::Verdict(status);
        Ok(())
    }
}

pub(crate) fn answer(exchange: &GuestExchange) -> Result<Answer<'static>, Failure> {
    match exchange {
        GuestExchange::Verdict(0) => Ok(Answer::default()),
        GuestExchange::Verdict(403) => Ok(Answer { decision: Decision::Block(BlockStatus::FORBIDDEN.into()), ..Answer::default() }),
        _ => Err(Failure::new(FailureKind::InvalidResult, "the verdict is neither 0 nor 403")),
    }
}
