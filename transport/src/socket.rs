//! Options of TCP sockets, the same at both ends.

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::TcpStream;

/// Seconds of silence after which the kernel asks whether the peer is there: under the 60 s of the strictest NATs.
const KEEPALIVE_IDLE_SECONDS: u32 = 30;
/// Seconds between such questions.
const KEEPALIVE_INTERVAL_SECONDS: u32 = 10;
/// Questions without an answer after which the connection is dead.
const KEEPALIVE_PROBES: u32 = 3;
/// Milliseconds after which sent but unacknowledged data ends the connection, instead of the kernel's 15 minutes.
const USER_TIMEOUT_MS: u32 = 60_000;

/// Small messages leave at once, and a peer that vanished is noticed.
///
/// An option that cannot be set is not worth losing the connection for: HTTP/2's own pings notice a dead peer too.
pub(crate) fn tune(stream: &TcpStream) {
    let results = [
        ("nodelay", stream.set_nodelay(true)),
        (
            "keepalive",
            setsockopt(stream, sockopt::KeepAlive, &true).map_err(Into::into),
        ),
        (
            "keepalive idle",
            setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS).map_err(Into::into),
        ),
        (
            "keepalive interval",
            setsockopt(
                stream,
                sockopt::TcpKeepInterval,
                &KEEPALIVE_INTERVAL_SECONDS,
            )
            .map_err(Into::into),
        ),
        (
            "keepalive probes",
            setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES).map_err(Into::into),
        ),
        (
            "user timeout",
            setsockopt(stream, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS).map_err(Into::into),
        ),
    ];
    for (option, result) in results {
        if let Err(error) = result {
            tracing::debug!(option, %error, "cannot set a socket option");
        }
    }
}
