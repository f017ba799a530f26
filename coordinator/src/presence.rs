//! `coordinator.json` in the state directory: where the coordinator that runs on it can be reached. It is written once
//! the port is open and removed at an orderly end, so that `yard up` and `yard run` find it; one that was left behind is
//! recognised by the lock beside it.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;
use serde::{Deserialize, Serialize};
use trainyard_common::ids::ClusterId;
use trainyard_common::time::Timestamp;
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::files;
use trainyard_transport::token::MAX_ENDPOINTS;

/// The file's name.
pub const FILE_NAME: &str = "coordinator.json";

/// A coordinator that listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Its process.
    pub pid: u32,
    /// Where it can be reached from this machine, in the order to try.
    pub endpoints: Vec<Endpoint>,
    /// When it started.
    pub started_at: Timestamp,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The directory with the local admin's credentials.
    pub admin_credentials: PathBuf,
}

impl Presence {
    /// Reads the file of a state directory; nothing if there is none.
    ///
    /// # Errors
    /// Whatever the file system says, or that the file is none of ours.
    pub fn read(data_dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(data_dir.join(FILE_NAME)) {
            Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn write(&self, data_dir: &Path) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(self)?;
        files::write_private(&data_dir.join(FILE_NAME), &json)
    }

    pub(crate) fn remove(data_dir: &Path) {
        // Left behind, it is only untidy.
        let _ = fs::remove_file(data_dir.join(FILE_NAME));
    }
}

/// This machine's name, if it has one that can be an endpoint.
pub(crate) fn hostname() -> Option<String> {
    let name = trainyard_transport::host::name()?;
    name.parse::<Endpoint>().ok()?;
    Some(name)
}

/// Where others reach what listens at `local`: there, or for an unspecified address at every address of this machine
/// but loopback, and by its name; by loopback if there is nothing else.
pub(crate) fn reachable(local: SocketAddr) -> Vec<Endpoint> {
    if !local.ip().is_unspecified() {
        return endpoint(local.ip(), local.port()).into_iter().collect();
    }
    let mut found: Vec<Endpoint> = addresses(local.is_ipv4())
        .into_iter()
        .filter_map(|address| endpoint(address, local.port()))
        .take(MAX_ENDPOINTS - 1)
        .collect();
    let named = hostname().and_then(|name| format!("{name}:{}", local.port()).parse().ok());
    found.extend(named);
    if found.is_empty() {
        loopback(local).into_iter().collect()
    } else {
        found
    }
}

/// The same from this machine, where loopback works whatever becomes of the network.
pub(crate) fn reachable_here(local: SocketAddr, advertised: &[Endpoint]) -> Vec<Endpoint> {
    let here = if local.ip().is_unspecified() {
        loopback(local)
    } else {
        endpoint(local.ip(), local.port())
    };
    let mut endpoints: Vec<Endpoint> = here.into_iter().collect();
    for other in advertised {
        if endpoints.len() < MAX_ENDPOINTS && !endpoints.contains(other) {
            endpoints.push(other.clone());
        }
    }
    endpoints
}

fn loopback(local: SocketAddr) -> Option<Endpoint> {
    let address: IpAddr = if local.is_ipv4() {
        [127, 0, 0, 1].into()
    } else {
        std::net::Ipv6Addr::LOCALHOST.into()
    };
    endpoint(address, local.port())
}

fn endpoint(address: IpAddr, port: u16) -> Option<Endpoint> {
    SocketAddr::new(address, port).to_string().parse().ok()
}

/// Addresses of this machine's interfaces, IPv4 first, without loopback and link-local ones.
fn addresses(only_ipv4: bool) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for interface in getifaddrs().into_iter().flatten() {
        let Some(address) = interface.address else {
            continue;
        };
        let address: Option<IpAddr> = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => Some(v4.ip().into()),
            (None, Some(v6)) if !only_ipv4 => Some(v6.ip().into()),
            _ => None,
        };
        let usable = |address: &IpAddr| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        };
        found.extend(address.filter(usable));
    }
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fixed_address_is_told_as_it_is_and_an_unspecified_one_never_is() {
        let fixed: SocketAddr = "127.0.0.1:7".parse().unwrap();
        assert_eq!(reachable(fixed), ["127.0.0.1:7".parse().unwrap()]);
        let any: SocketAddr = "0.0.0.0:7".parse().unwrap();
        let told = reachable(any);
        assert!(!told.is_empty() && told.len() <= MAX_ENDPOINTS);
        assert!(
            told.iter()
                .all(|endpoint| endpoint.host() != "0.0.0.0" && endpoint.port() == 7),
            "{told:?}"
        );
        let here = reachable_here(any, &told);
        assert_eq!(here[0].to_string(), "127.0.0.1:7");
        assert!(here.len() <= MAX_ENDPOINTS);
    }

    #[test]
    fn presence_comes_back_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Presence::read(dir.path()).unwrap(), None);
        let presence = Presence {
            pid: 7,
            endpoints: vec!["127.0.0.1:7".parse().unwrap()],
            started_at: Timestamp(9),
            cluster: ClusterId([1; 16]),
            admin_credentials: "admin".into(),
        };
        presence.write(dir.path()).unwrap();
        assert_eq!(Presence::read(dir.path()).unwrap(), Some(presence));
        Presence::remove(dir.path());
        assert_eq!(Presence::read(dir.path()).unwrap(), None);
    }
}
