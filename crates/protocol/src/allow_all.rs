//! The handler of unit tests.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use zentinel_wasm_contract::report::Reports;
use zentinel_wasm_contract::{Answer, Arrival, Capabilities, Encode, Event, Failure, Handler, Hook};

/// Allows every event. Applies a configuration within the time that it is given.
pub(crate) struct AllowAll {
    configuring: Duration,
    reports: watch::Sender<Arc<Reports>>,
}

impl AllowAll {
    pub(crate) fn new(configuring: Duration) -> Arc<Self> {
        Arc::new(Self { configuring, reports: watch::Sender::new(Arc::default()) })
    }
}

impl Handler for AllowAll {
    fn capabilities(&self) -> Capabilities {
        Capabilities { hooks: std::iter::empty().collect(), max_body: 0 }
    }

    #[expect(clippy::manual_async_fn, reason = "the trait's future is 'static")]
    fn handle<E: Encode>(self: &Arc<Self>, _: &Event<'_>, _: Arrival, encode: E) -> impl Future<Output = E::Encoded> + Send + 'static {
        async move { encode.encode(&Answer::default()).unwrap() }
    }

    fn reject<E: Encode>(self: &Arc<Self>, _: Hook, _: Failure, encode: E) -> E::Encoded {
        encode.encode(&Answer::default()).unwrap()
    }

    fn configure(self: &Arc<Self>, _: serde_json::Value) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let configuring = self.configuring;
        async move {
            tokio::time::sleep(configuring).await;
            Ok(())
        }
    }

    fn reports(&self) -> watch::Receiver<Arc<Reports>> {
        self.reports.subscribe()
    }
}
