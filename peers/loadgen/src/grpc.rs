//! Load over gRPC: HTTP/2 with messages encoded in advance, because building them during the load
//! would cost the generator as much as reading them costs the agent.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{RecvStream, SendStream};
use http::Request;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use zentinel_agent_protocol::grpc_v2::{HandshakeRequest, proxy_to_agent};

use crate::load::{DRAIN, Pace, Plan, Requests, Writes};
use crate::wire::{PREFIX, grpc_message};

/// Large enough that flow control never holds answers back.
const WINDOW: u32 = 1 << 20;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

struct Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Bytes received after the handshake response.
    rest: Vec<u8>,
    // Dropping the last handle closes the connection.
    _keep: SendRequest<Bytes>,
}

async fn open(address: SocketAddr) -> Result<Stream, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("cannot {what} the agent at `{address}`: {error}");
    let tcp = TcpStream::connect(address).await.map_err(|error| failed("reach", &error))?;
    tcp.set_nodelay(true).map_err(|error| failed("reach", &error))?;
    let (mut client, connection) = client::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake(tcp)
        .await
        .map_err(|error| failed("speak HTTP/2 with", &error))?;
    tokio::spawn(connection);
    let request = Request::post(format!("http://{address}/zentinel.agent.v2.AgentServiceV2/ProcessStream"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|error| failed("call", &error))?;
    let (response, mut send) = client.send_request(request, false).map_err(|error| failed("call", &error))?;
    let handshake = proxy_to_agent::Message::Handshake(HandshakeRequest {
        supported_versions: vec![2],
        proxy_id: "loadgen".to_owned(),
        proxy_version: "0.6.54".to_owned(),
        config_json: "{}".to_owned(),
    });
    send.send_data(grpc_message(handshake).into(), false).map_err(|error| failed("write to", &error))?;
    let mut receive = response.await.map_err(|error| failed("call", &error))?.into_body();
    let mut handshake = Vec::new();
    while handshake.len() < PREFIX || handshake.len() < PREFIX + message_length(&handshake) {
        handshake.extend_from_slice(&next_data(&mut receive).await?);
    }
    let rest = handshake.split_off(PREFIX + message_length(&handshake));
    Ok(Stream { send, receive, rest, _keep: client })
}

fn message_length(prefix: &[u8]) -> usize {
    u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize
}

async fn next_data(receive: &mut RecvStream) -> Result<Bytes, String> {
    let data = receive.data().await.ok_or("the agent ended a stream")?.map_err(|error| format!("cannot read from the agent: {error}"))?;
    receive.flow_control().release_capacity(data.len()).map_err(|error| format!("cannot read from the agent: {error}"))?;
    Ok(data)
}

/// Runs the connections until the end of the plan, each with one stream as in the proxy.
pub(crate) fn run(address: SocketAddr, requests: Vec<Requests>, plan: &Plan, writes: Writes) -> Result<Vec<Requests>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the generator: {error}"))?;
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for requests in requests {
            let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, open(address))
                .await
                .map_err(|_| format!("no handshake from the agent at `{address}` within {} s", HANDSHAKE_TIMEOUT.as_secs()))??;
            tasks.push(tokio::spawn(drive(stream, requests, plan.clone(), writes)));
        }
        let mut finished = Vec::new();
        for task in tasks {
            finished.push(task.await.map_err(|error| error.to_string())??);
        }
        Ok(finished)
    })
}

async fn drive(mut stream: Stream, mut requests: Requests, plan: Plan, writes: Writes) -> Result<Requests, String> {
    let tick = start_ticker(&plan);
    let mut input = std::mem::take(&mut stream.rest);
    let mut output = Vec::new();
    requests.start_due(Instant::now(), &mut output);
    let drained = tokio::time::sleep_until((plan.measure_until + DRAIN).into());
    tokio::pin!(drained);
    loop {
        if !output.is_empty() {
            let mut bytes = Bytes::from(std::mem::take(&mut output));
            while !bytes.is_empty() {
                let end = match writes {
                    Writes::Together => bytes.len(),
                    Writes::Each => PREFIX + message_length(&bytes),
                };
                stream.send.send_data(bytes.split_to(end), false).map_err(|error| format!("cannot write to the agent: {error}"))?;
            }
        }
        if requests.idle() && Instant::now() >= plan.measure_until {
            break;
        }
        tokio::select! {
            biased;
            data = next_data(&mut stream.receive) => {
                let data = data?;
                let now = Instant::now();
                if input.is_empty() {
                    let taken = requests.take_answers(&data, now, &mut output)?;
                    input.extend_from_slice(&data[taken..]);
                } else {
                    input.extend_from_slice(&data);
                    let taken = requests.take_answers(&input, now, &mut output)?;
                    input.drain(..taken);
                }
            }
            () = tick.notified() => {
                requests.start_due(Instant::now(), &mut output);
            }
            () = &mut drained => break,
        }
    }
    requests.give_up();
    Ok(requests)
}

/// Ticks at the pace of an open loop until the end of the plan. A thread keeps the time because the
/// runtime's timers have a resolution of 1 ms, which is as long as many answers take.
fn start_ticker(plan: &Plan) -> Arc<Notify> {
    let tick = Arc::new(Notify::new());
    if let Pace::Open { interval } = plan.pace {
        let (tick, until) = (Arc::clone(&tick), plan.measure_until);
        thread::spawn(move || {
            let mut due = Instant::now();
            while due <= until {
                due += interval;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                tick.notify_one();
            }
        });
    }
    tick
}
