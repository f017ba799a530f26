//! Where a coordinator can be reached: `host:port`, the port 7443 unless given.
//!
//! It resolves nothing.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The coordinator's port unless configured otherwise.
pub const DEFAULT_PORT: u16 = 7443;

/// A host name or IP address with a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    host: String,
    port: u16,
}

impl Endpoint {
    /// The host name or address, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        let invalid = || InvalidEndpoint {
            text: text.chars().take(64).collect(),
        };
        let (host, port) = split(text).ok_or_else(invalid)?;
        let port = match port {
            Some(port) => parse_port(port).ok_or_else(invalid)?,
            None => DEFAULT_PORT,
        };
        Ok(Self { host, port })
    }
}

impl Serialize for Endpoint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A text that is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an endpoint; expected `host:port`, such as head.example.org:7443 or [::1]:7443"
)]
pub struct InvalidEndpoint {
    /// What was given, cut to a readable length.
    pub text: String,
}

fn split(text: &str) -> Option<(String, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once(']')?;
        let address: Ipv6Addr = address.parse().ok()?;
        let port = if rest.is_empty() {
            None
        } else {
            Some(rest.strip_prefix(':')?)
        };
        return Some((address.to_string(), port));
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    is_host(host).then(|| (host.to_owned(), port))
}

fn is_host(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok() || rustls::pki_types::DnsName::try_from(host).is_ok()
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_a_normal_form() {
        for (text, normal) in [
            ("head", "head:7443"),
            ("head:1", "head:1"),
            ("10.0.0.1:65535", "10.0.0.1:65535"),
            ("[::1]", "[::1]:7443"),
            ("[0:0::1]:8", "[::1]:8"),
            ("a_b.example.org", "a_b.example.org:7443"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), normal);
            assert_eq!(normal.parse(), Ok(endpoint));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "", ":1", "a:", "a:0", "a:+1", "a:65536", "a:b", "a:1:2", "::1", "[::1", "[a]:1",
            "[::1]1", "http://a", "a/b", "a b:1", "user@a:1", "é:1",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
