//! A slow line: a TCP proxy on the coordinator's host that holds every byte back for a while, in both directions. It
//! stands for what the kernel's netem does elsewhere. What passes through it is not looked at.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::net::{HEAD, Network, address};
use super::rest;

/// Pieces under way in one direction; at 64 KiB each this is far above what a delay of a second needs.
const PIECES: usize = 256;
/// How soon a thread notices that the proxy ends.
const NOTICE: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct Line {
    delay: AtomicU64,
    ends: AtomicBool,
}

/// The running proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens at one port of the coordinator's host and passes on to another one there.
    pub(crate) fn start(network: &Network, listen: u16, to: u16) -> std::io::Result<Self> {
        let line = Arc::new(Line::default());
        let shared = Arc::clone(&line);
        // The socket belongs to the namespace of the thread that makes it, so a thread of its own goes there.
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                network.enter(HEAD)?;
                let listener = TcpListener::bind((address(HEAD), listen))?;
                listener.set_nonblocking(true)?;
                Ok::<_, std::io::Error>(std::thread::spawn(move || serve(&listener, to, &shared)))
            });
            let thread = made.join().expect("the thread does not panic")?;
            Ok(Self {
                line,
                thread: Some(thread),
            })
        })
    }

    /// Holds back for so long from now on; what is under way keeps its time.
    pub(crate) fn delay(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.line.delay.store(millis, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, to: u16, line: &Arc<Line>) {
    while !line.ends.load(Ordering::Relaxed) {
        let Ok((near, _)) = listener.accept() else {
            // Nobody, or not now.
            rest(Duration::from_millis(10));
            continue;
        };
        // With nobody there the caller is hung up on, as without a proxy.
        let Ok(far) = TcpStream::connect((address(HEAD), to)) else {
            continue;
        };
        for stream in [&near, &far] {
            let _ = stream.set_nonblocking(false);
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(NOTICE));
        }
        let (Ok(near_again), Ok(far_again)) = (near.try_clone(), far.try_clone()) else {
            continue;
        };
        carry(near, far, line);
        carry(far_again, near_again, line);
    }
}

/// Carries one direction until it ends.
fn carry(mut from: TcpStream, to: TcpStream, line: &Arc<Line>) {
    let (sender, receiver) = sync_channel(PIECES);
    let line = Arc::clone(line);
    std::thread::spawn(move || {
        take(&mut from, &sender, &line);
    });
    std::thread::spawn(move || give(to, &receiver));
}

fn take(from: &mut TcpStream, sender: &SyncSender<(Instant, Vec<u8>)>, line: &Line) {
    let mut buffer = vec![0; 64 << 10];
    while !line.ends.load(Ordering::Relaxed) {
        let length = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                continue;
            }
            Err(_) => return,
        };
        let due = Instant::now() + Duration::from_millis(line.delay.load(Ordering::Relaxed));
        if sender.send((due, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

fn give(mut to: TcpStream, receiver: &Receiver<(Instant, Vec<u8>)>) {
    while let Ok((due, piece)) = receiver.recv() {
        rest(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    // Both ways: what came from a peer that is gone needs no answer.
    let _ = to.shutdown(Shutdown::Both);
}
