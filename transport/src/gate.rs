//! Cuts connections on purpose: while a gate is closed, connections made through it fail and new ones are not tried, so
//! that nothing leaves this process. It does not know why; `yard selftest --partition` asks for it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

/// Open unless it was closed for a while. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate(watch::Sender<Closed>);

/// Until when, and how often it was closed.
#[derive(Debug, Clone, Copy, Default)]
struct Closed {
    until: Option<Instant>,
    times: u64,
}

impl Default for Gate {
    fn default() -> Self {
        Self(watch::Sender::new(Closed::default()))
    }
}

impl Gate {
    /// Ends every connection that was made through it, and lets none through for so long. The longer time counts if it
    /// is closed already.
    pub fn close_for(&self, duration: Duration) {
        self.0.send_modify(|closed| {
            closed.until = closed.until.max(Some(Instant::now() + duration));
            closed.times += 1;
        });
    }

    /// Whether nothing may pass now.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0
            .borrow()
            .until
            .is_some_and(|until| Instant::now() < until)
    }

    /// The stream, broken as soon as the gate is closed.
    pub(crate) fn through(&self, stream: TcpStream) -> Gated {
        let mut closes = self.0.subscribe();
        let before = closes.borrow_and_update().times;
        let closed = async move {
            // A sender that is gone never closes it.
            if closes.wait_for(|now| now.times > before).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        Gated {
            stream,
            closed: Box::pin(closed),
            broken: false,
        }
    }
}

/// What tells of a gate's closing.
type Closing = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A connection through a gate.
pub(crate) struct Gated {
    stream: TcpStream,
    closed: Closing,
    broken: bool,
}

impl std::fmt::Debug for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gated")
            .field("stream", &self.stream)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Gated {
    /// Its own address.
    #[cfg(test)]
    pub(crate) fn local_addr(&self) -> io::Result<std::net::SocketAddr> {
        self.stream.local_addr()
    }

    /// An error once the gate was closed. Whoever reads is woken for it; HTTP/2 always reads.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        self.broken = self.broken || self.closed.as_mut().poll(context).is_ready();
        match self.broken {
            true => Err(cut()),
            false => Ok(()),
        }
    }
}

/// What a connection through a closed gate says.
pub(crate) fn cut() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "cut off on purpose, for a self test",
    )
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::testing::soon;

    #[tokio::test]
    async fn a_closed_gate_breaks_what_waits_and_opens_by_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Gate::default();
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        let mut gated = gate.through(stream);
        gated.write_all(b"a").await.unwrap();
        assert_eq!(peer.read_u8().await.unwrap(), b'a');
        let closer = gate.clone();
        let reader = crate::task::spawn("reader", async move {
            let result = gated.read_u8().await.map(drop);
            (gated, result)
        });
        closer.close_for(Duration::from_millis(100));
        let (mut gated, result) = soon("the end of the read", reader).await.unwrap();
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(gated.write_all(b"b").await.is_err());
        assert!(gate.is_closed());
        drop(gated);
        // Nothing but the end of the connection arrives.
        assert_eq!(peer.read(&mut [0; 8]).await.unwrap(), 0);
        let mut open = tokio::time::interval(Duration::from_millis(10));
        while gate.is_closed() {
            open.tick().await;
        }
        let stream = TcpStream::connect(address).await.unwrap();
        gate.through(stream).write_all(b"c").await.unwrap();
    }
}
