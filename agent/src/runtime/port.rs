//! The rendezvous port of a member: chosen and held here until the ranks start. Knows nothing of what uses it.
//!
//! A held port is bound but does not listen, so nobody else can have it and nobody can connect. Between its release
//! and the first rank's own bind it is free for a moment; other shims are kept off it by an abstract socket of the
//! same number, other programs by the choice outside the range that the kernel gives to outgoing connections.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, bind, getsockname,
    setsockopt, socket, sockopt,
};

/// Where ports are looked for: below the usual ephemeral range, above the services that machines tend to run.
const RANGE: RangeInclusive<u16> = 20_000..=32_767;
/// Random tries before the kernel is asked for any port: even with half of the range taken, all of them fail once in
/// 2^64 times.
const TRIES: usize = 64;

/// A port that nobody else can bind.
#[derive(Debug)]
pub(crate) struct HeldPort {
    port: u16,
    socket: Option<OwnedFd>,
    _name: UnixDatagram,
}

impl HeldPort {
    /// Finds and holds one.
    pub(crate) fn take() -> io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
        let candidates = candidates(text.ok().as_deref().and_then(parse_range));
        for _ in 0..TRIES {
            if candidates.is_empty() {
                break;
            }
            let index = usize::from(random()?) % candidates.len();
            if let Some(held) = Self::try_take(candidates[index])? {
                return Ok(held);
            }
        }
        for _ in 0..TRIES {
            if let Some(held) = Self::try_take(0)? {
                return Ok(held);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "no free port was found for the rendezvous",
        ))
    }

    /// Its number.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Lets a rank bind it; other shims still keep off.
    pub(crate) fn release(&mut self) {
        self.socket = None;
    }

    /// Makes sure that it can still be bound after somebody had it, and nobody has it now. It stays released.
    pub(crate) fn is_usable(&self) -> bool {
        bind_wildcard(self.port).is_ok()
    }

    fn try_take(port: u16) -> io::Result<Option<Self>> {
        let (socket, port) = match bind_wildcard(port) {
            Ok(bound) => bound,
            Err(Errno::EADDRINUSE | Errno::EACCES) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match bind_name(port) {
            Ok(name) => Ok(Some(Self {
                port,
                socket: Some(socket),
                _name: name,
            })),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Held for the attempt's whole life, also by shims of other agents in this network namespace.
fn bind_name(port: u16) -> io::Result<UnixDatagram> {
    let name = SocketAddr::from_abstract_name(format!("trainyard-port-{port}"))?;
    UnixDatagram::bind_addr(&name)
}

/// Binds all addresses of both families where the machine has both, and tells the port.
fn bind_wildcard(port: u16) -> Result<(OwnedFd, u16), Errno> {
    match bind_v6(port) {
        Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => bind_v4(port),
        result => result,
    }
}

fn bind_v6(port: u16) -> Result<(OwnedFd, u16), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet6, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    let any = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
    bind(socket.as_raw_fd(), &any)?;
    let port = port_of(&socket)?;
    Ok((socket, port))
}

fn bind_v4(port: u16) -> Result<(OwnedFd, u16), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    let any = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    bind(socket.as_raw_fd(), &any)?;
    let port = port_of(&socket)?;
    Ok((socket, port))
}

fn port_of(socket: &OwnedFd) -> Result<u16, Errno> {
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    address
        .as_sockaddr_in6()
        .map(SockaddrIn6::port)
        .or_else(|| address.as_sockaddr_in().map(SockaddrIn::port))
        .ok_or(Errno::EAFNOSUPPORT)
}

fn random() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(u16::from_le_bytes(bytes))
}

fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut parts = text.split_whitespace().map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Some(first..=last),
        _ => None,
    }
}

fn candidates(ephemeral: Option<RangeInclusive<u16>>) -> Vec<u16> {
    RANGE
        .filter(|port| !ephemeral.as_ref().is_some_and(|range| range.contains(port)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_ephemeral_range_is_left_out() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(parse_range("x"), None);
        assert_eq!(candidates(Some(32_768..=60_999)).len(), 12_768);
        assert_eq!(candidates(Some(20_002..=65_535)), [20_000, 20_001]);
        assert!(candidates(Some(1024..=65_535)).is_empty());
        assert_eq!(candidates(None).len(), 12_768);
    }

    #[test]
    fn a_held_port_is_nobody_elses_until_it_is_released() {
        let mut held = HeldPort::take().unwrap();
        let port = held.port();
        assert!(TcpListener::bind(("0.0.0.0", port)).is_err());
        assert!(TcpListener::bind(("127.0.0.1", port)).is_err());
        assert!(HeldPort::try_take(port).unwrap().is_none());
        held.release();
        assert!(HeldPort::try_take(port).unwrap().is_none());
        drop(TcpListener::bind(("127.0.0.1", port)).unwrap());
        drop(held);
        assert!(HeldPort::try_take(port).unwrap().is_some());
    }
}
