//! Who is at the other end of a connection, and its text in certificates: one URI
//! `spiffe://<cluster>/coordinator`, `spiffe://<cluster>/node/<number>` or `spiffe://<cluster>/user/<name>`.
//!
//! It knows neither keys nor certificates, and nothing of what an identity may do.

use std::fmt;
use std::str::FromStr;

use trainyard_common::ids::{ClusterId, NodeId, UserName};

/// Who holds a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// The head of the cluster.
    Coordinator,
    /// The agent of one node.
    Node(NodeId),
    /// A person, or a program that acts for one.
    User(UserName),
}

impl Identity {
    /// The text of this identity inside `cluster`.
    #[must_use]
    pub fn in_cluster(&self, cluster: ClusterId) -> SpiffeId {
        SpiffeId {
            cluster,
            identity: self.clone(),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => write!(f, "coordinator"),
            Self::Node(node) => write!(f, "node/{}", node.0),
            Self::User(user) => write!(f, "user/{}", user.as_str()),
        }
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let identity = match text.split_once('/') {
            None if text == "coordinator" => Self::Coordinator,
            Some(("node", number)) => Self::Node(NodeId(parse_number(number)?)),
            Some(("user", name)) => {
                Self::User(name.parse().map_err(|_| InvalidIdentity::UserName)?)
            }
            _ => return Err(InvalidIdentity::Path),
        };
        Ok(identity)
    }
}

/// An identity together with the cluster whose authority vouches for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    /// The cluster.
    pub cluster: ClusterId,
    /// Who it is inside that cluster.
    pub identity: Identity,
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}", self.cluster, self.identity)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text
            .strip_prefix("spiffe://")
            .ok_or(InvalidIdentity::Scheme)?;
        let (cluster, path) = rest.split_once('/').ok_or(InvalidIdentity::Path)?;
        let cluster: ClusterId = cluster.parse().map_err(|_| InvalidIdentity::Cluster)?;
        let id = Self {
            cluster,
            identity: path.parse()?,
        };
        // One identity has one text. Whatever a lenient parser below lets through (upper case, signs,
        // leading zeros) would otherwise be a second name of the same thing.
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(InvalidIdentity::NotCanonical)
        }
    }
}

/// Why a text is not an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// It is no SPIFFE URI.
    #[error("an identity begins with `spiffe://`")]
    Scheme,
    /// The cluster id is not one.
    #[error("the cluster id in the identity is not 32 hex digits")]
    Cluster,
    /// The path names nothing that exists here.
    #[error("an identity is `coordinator`, `node/<number>` or `user/<name>`")]
    Path,
    /// The node number is not one.
    #[error("the node number in the identity is not a number below 2^32")]
    NodeNumber,
    /// The user name is not one.
    #[error("the user name in the identity is not valid")]
    UserName,
    /// It has another, normal spelling.
    #[error("the identity is not in its normal spelling")]
    NotCanonical,
}

fn parse_number(text: &str) -> Result<u32, InvalidIdentity> {
    let number: u32 = text.parse().map_err(|_| InvalidIdentity::NodeNumber)?;
    if number.to_string() == text {
        Ok(number)
    } else {
        Err(InvalidIdentity::NotCanonical)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> ClusterId {
        ClusterId([0xab; 16])
    }

    #[test]
    fn every_identity_survives_its_text() {
        for identity in [
            Identity::Coordinator,
            Identity::Node(NodeId(0)),
            Identity::Node(NodeId(u32::MAX)),
            Identity::User("anna".parse().unwrap()),
        ] {
            let id = identity.in_cluster(cluster());
            assert_eq!(id.to_string().parse(), Ok(id.clone()), "{id}");
        }
        assert_eq!(
            Identity::Node(NodeId(7)).in_cluster(cluster()).to_string(),
            format!("spiffe://{}/node/7", "ab".repeat(16))
        );
    }

    #[test]
    fn near_misses_are_refused() {
        let c = "ab".repeat(16);
        let upper = "AB".repeat(16);
        for text in [
            String::new(),
            "node/7".into(),
            format!("https://{c}/node/7"),
            format!("spiffe://{c}"),
            format!("spiffe://{c}/"),
            format!("spiffe://{c}/node"),
            format!("spiffe://{c}/node/"),
            format!("spiffe://{c}/node/+7"),
            format!("spiffe://{c}/node/07"),
            format!("spiffe://{c}/node/n7"),
            format!("spiffe://{c}/node/7/"),
            format!("spiffe://{c}/node/4294967296"),
            format!("spiffe://{c}/Node/7"),
            format!("spiffe://{c}/user/"),
            format!("spiffe://{c}/user/a/b"),
            format!("spiffe://{c}/user/../coordinator"),
            format!("spiffe://{c}/coordinator/"),
            format!("spiffe://{c}/coordinator/x"),
            format!("spiffe://{c}/admin/anna"),
            format!("spiffe://{upper}/node/7"),
            format!("spiffe://{c}x/node/7"),
            format!("spiffe://x@{c}/node/7"),
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
