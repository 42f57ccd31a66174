//! The part of systemd that a service notices: notifications and the descriptor store.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

/// Passes standard input on as the first descriptor of the store.
const WITH_STORE: &str = r#"exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$0" "$@""#;

/// A service manager with a descriptor store, as of systemd 254.
pub struct ServiceManager {
    folder: TempDir,
    state: Arc<Mutex<ServiceState>>,
}

#[derive(Default)]
struct ServiceState {
    /// The descriptors with their names.
    store: Vec<(String, OwnedFd)>,
    /// Every line of every notification.
    notifications: Vec<String>,
    /// Barriers are not removed.
    is_stuck: bool,
    barriers: Vec<OwnedFd>,
}

impl ServiceManager {
    /// Starts to receive notifications, on a thread that ends with the process.
    #[track_caller]
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        let state: Arc<Mutex<ServiceState>> = Arc::default();
        let receiver = Arc::clone(&state);
        std::thread::spawn(move || {
            while let Some((message, descriptors)) = receive(&socket) {
                receiver.lock().unwrap().notified(&message, descriptors);
            }
        });
        Self { folder, state }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("notify")
    }

    /// A command that runs `command` as the service's next process, with what is in the store.
    #[track_caller]
    pub fn service(&self, command: &Command) -> Command {
        let state = self.state.lock().unwrap();
        assert!(state.store.len() <= 1, "{} descriptors in the store", state.store.len());
        let mut service = match state.store.first() {
            Some((name, descriptor)) => {
                let mut shell = Command::new("/bin/sh");
                shell.env_clear().arg("-c").arg(WITH_STORE).arg(command.get_program());
                shell.env("LISTEN_FDNAMES", name).stdin(Stdio::from(descriptor.try_clone().unwrap()));
                shell
            }
            None => {
                let mut service = Command::new(command.get_program());
                service.env_clear().stdin(Stdio::null());
                service
            }
        };
        service.args(command.get_args()).stdout(Stdio::null()).stderr(Stdio::piped());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                service.env(name, value);
            }
        }
        service.env("NOTIFY_SOCKET", self.socket()).env("FDSTORE", "4");
        service
    }

    /// Number of descriptors in the store.
    pub fn stored(&self) -> usize {
        self.state.lock().unwrap().store.len()
    }

    /// How many notifications had this line.
    pub fn notified(&self, line: &str) -> usize {
        self.state.lock().unwrap().notifications.iter().filter(|other| *other == line).count()
    }

    /// Takes descriptors from now on, and never confirms it.
    pub fn get_stuck(&self) {
        self.state.lock().unwrap().is_stuck = true;
    }

    /// Closes the store, as when the service stops for good.
    pub fn close_store(&self) {
        self.state.lock().unwrap().store.clear();
    }
}

impl ServiceState {
    fn notified(&mut self, message: &str, descriptors: Vec<OwnedFd>) {
        let has = |line: &str| message.lines().any(|other| other == line);
        let name = message.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if has("FDSTORE=1") {
            assert!(has("FDPOLL=0"), "systemd would close it, because the other end is closed: {message}");
            self.store.extend(descriptors.into_iter().map(|descriptor| (name.clone(), descriptor)));
        } else if has("BARRIER=1") && self.is_stuck {
            self.barriers.extend(descriptors);
        } else if has("FDSTOREREMOVE=1") && !self.is_stuck {
            self.store.retain(|(other, _)| *other != name);
        }
        self.notifications.extend(message.lines().map(str::to_owned));
    }
}

/// A notification and its descriptors.
fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut message = [0; 4096];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let mut descriptors = Vec::new();
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = item {
            descriptors.extend(rights);
        }
    }
    Some((String::from_utf8_lossy(&message[..received.bytes]).into_owned(), descriptors))
}
