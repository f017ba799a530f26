//! Tokens and users as they are on record.

use trainyard_common::record::{TokenGrant, TokenRecord, UserRecord};

use super::scalar::{digest, required, text, timestamp, to_timestamp, token_id};
use super::{InvalidField, WireEnum, enum_field};
use crate::v1;

impl From<&TokenGrant> for v1::TokenGrant {
    fn from(grant: &TokenGrant) -> Self {
        use v1::token_grant::Grant;
        let grant = match grant {
            TokenGrant::Node { target } => Grant::Node(v1::NodeGrant {
                target: target.number(),
            }),
            TokenGrant::User { name, role } => Grant::User(v1::UserGrant {
                name: name.to_string(),
                role: role.number(),
            }),
        };
        Self { grant: Some(grant) }
    }
}

impl TryFrom<v1::TokenGrant> for TokenGrant {
    type Error = InvalidField;

    fn try_from(message: v1::TokenGrant) -> Result<Self, InvalidField> {
        use v1::token_grant::Grant;
        let v1::TokenGrant { grant } = message;
        match grant {
            Some(Grant::Node(v1::NodeGrant { target })) => Ok(Self::Node {
                target: enum_field("node.target", target)?,
            }),
            Some(Grant::User(v1::UserGrant { name, role })) => Ok(Self::User {
                name: text("user.name", &name)?,
                role: enum_field("user.role", role)?,
            }),
            None => Err(InvalidField::missing("grant")),
        }
    }
}

impl From<&TokenRecord> for v1::Token {
    fn from(token: &TokenRecord) -> Self {
        let TokenRecord {
            id,
            secret_hash,
            grant,
            created_by,
            workspace,
            created_at,
            expires_at,
            uses_left,
            revoked,
        } = token;
        Self {
            id: id.0,
            secret_hash: secret_hash.0.to_vec(),
            grant: Some(grant.into()),
            created_by: created_by.to_string(),
            workspace: workspace.to_string(),
            created_at: Some(timestamp(*created_at)),
            expires_at: Some(timestamp(*expires_at)),
            uses_left: *uses_left,
            revoked: *revoked,
        }
    }
}

/// A token as users may see it: without the hash of its secret. It does not convert back to a record.
#[must_use]
pub fn without_secret(token: &TokenRecord) -> v1::Token {
    v1::Token {
        secret_hash: Vec::new(),
        ..v1::Token::from(token)
    }
}

impl TryFrom<v1::Token> for TokenRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Token) -> Result<Self, InvalidField> {
        let v1::Token {
            id,
            secret_hash,
            grant,
            created_by,
            workspace,
            created_at,
            expires_at,
            uses_left,
            revoked,
        } = message;
        Ok(Self {
            id: token_id("id", id)?,
            secret_hash: digest("secret_hash", &secret_hash)?,
            grant: required("grant", grant)?,
            created_by: text("created_by", &created_by)?,
            workspace: text("workspace", &workspace)?,
            created_at: to_timestamp("created_at", created_at)?,
            expires_at: to_timestamp("expires_at", expires_at)?,
            uses_left,
            revoked,
        })
    }
}

impl From<&UserRecord> for v1::User {
    fn from(user: &UserRecord) -> Self {
        let UserRecord {
            name,
            role,
            workspace,
            created_at,
        } = user;
        Self {
            name: name.to_string(),
            role: role.number(),
            workspace: workspace.to_string(),
            created_at: Some(timestamp(*created_at)),
        }
    }
}

impl TryFrom<v1::User> for UserRecord {
    type Error = InvalidField;

    fn try_from(message: v1::User) -> Result<Self, InvalidField> {
        let v1::User {
            name,
            role,
            workspace,
            created_at,
        } = message;
        Ok(Self {
            name: text("name", &name)?,
            role: enum_field("role", role)?,
            workspace: text("workspace", &workspace)?,
            created_at: to_timestamp("created_at", created_at)?,
        })
    }
}
