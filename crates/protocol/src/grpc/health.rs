//! The standard health service. The agent is serving while it reports itself as ready: while its
//! module decides about requests.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use prost::Message as _;
use tokio::sync::watch;
use tonic::Status;

use super::health_proto::health_check_response::ServingStatus;
use super::health_proto::{HealthCheckRequest, HealthCheckResponse};
use super::proto::SERVICE;
use crate::stage::Stage;
use zentinel_wasm_contract::Handler;
use zentinel_wasm_contract::report::Reports;

/// Name of the health service.
pub(super) const HEALTH: &str = "grpc.health.v1.Health";

fn read(bytes: Bytes) -> Result<HealthCheckRequest, Status> {
    HealthCheckRequest::decode(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Status of a service, or `None` for an unknown one. An empty name means the whole agent.
fn status(service: &str, reports: &Reports, drained: bool) -> Option<ServingStatus> {
    if !["", SERVICE, HEALTH].contains(&service) {
        return None;
    }
    Some(if reports.health.ready && !drained { ServingStatus::Serving } else { ServingStatus::NotServing })
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

/// Returns the status of a service. It is not serving for a client that asked for a drain.
pub(super) fn check<H: Handler>(handler: &H, drained: bool, bytes: Bytes) -> Result<HealthCheckResponse, Status> {
    let request = read(bytes)?;
    let status = status(&request.service, &handler.reports().borrow(), drained);
    status.map(response).ok_or_else(|| Status::not_found("unknown service"))
}

/// Streams the status of a service at each change, until the agent drains.
pub(super) fn watch<H: Handler>(
    handler: &Arc<H>,
    stage: watch::Receiver<Stage>,
    drained: watch::Receiver<bool>,
    bytes: Bytes,
) -> Result<impl Stream<Item = Result<HealthCheckResponse, Status>> + Send + 'static, Status> {
    let request = read(bytes)?;
    let state = (handler.reports(), stage, drained, request.service, None);
    Ok(stream::unfold(state, |(mut reports, mut stage, mut drained, service, mut last)| async move {
        loop {
            let draining = *stage.borrow() > Stage::Serving;
            let now = status(&service, &reports.borrow_and_update(), *drained.borrow_and_update()).unwrap_or(ServingStatus::ServiceUnknown);
            if last.replace(now) != Some(now) {
                return Some((Ok(response(now)), (reports, stage, drained, service, last)));
            }
            if draining {
                return None;
            }
            tokio::select! {
                changed = reports.changed() => changed.ok()?,
                changed = drained.changed() => changed.ok()?,
                changed = stage.wait_for(|stage| *stage > Stage::Serving) => {
                    changed.ok()?;
                }
            }
        }
    }))
}
