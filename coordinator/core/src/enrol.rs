//! Join tokens, and the nodes and users that come with one. A token that is not good is refused with one and the same
//! message, so that nobody learns which part was wrong. It must not know the secret, only its hash.

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{
    Digest, Incarnation, NodeId, TokenId, UserName, WorkspaceName, is_name,
};
use trainyard_common::inventory::Inventory;
use trainyard_common::limits;
use trainyard_common::record::{NodeRecord, Role, Target, TokenGrant, TokenRecord, UserRecord};
use trainyard_common::state::{NodeAvailability, NodePolicy, Reason, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::Core;
use crate::effect::Answer;

/// Longest name; see [`is_name`].
const MAX_NAME: usize = 63;

/// A token that somebody wants.
pub(crate) struct TokenWish {
    pub(crate) by: UserName,
    pub(crate) secret_hash: Digest,
    pub(crate) grant: TokenGrant,
    pub(crate) uses: u32,
    pub(crate) ttl: std::time::Duration,
}

impl Core {
    pub(crate) fn on_token_requested(
        &mut self,
        now: Timestamp,
        wish: TokenWish,
    ) -> Result<Answer, Refusal> {
        if !(1..=limits::MAX_TOKEN_USES).contains(&wish.uses) {
            let message = format!(
                "{} uses is outside 1 to {}; choose within that",
                wish.uses,
                limits::MAX_TOKEN_USES
            );
            return Err(invalid("uses", message));
        }
        if !(limits::MIN_TOKEN_TTL..=limits::MAX_TOKEN_TTL).contains(&wish.ttl) {
            let message = format!(
                "a life of {} is outside {} to {}; choose within that",
                format_duration(wish.ttl),
                format_duration(limits::MIN_TOKEN_TTL),
                format_duration(limits::MAX_TOKEN_TTL)
            );
            return Err(invalid("ttl", message));
        }
        if self.t.tokens.len() >= self.config.max_tokens {
            self.t.tokens.retain(|_, token| is_usable(token, now));
        }
        if self.t.tokens.len() >= self.config.max_tokens {
            let message = format!(
                "there are {} join tokens that can be used, as many as there may be; revoke one with `yard token revoke`",
                self.t.tokens.len()
            );
            return Err(Refusal::new(
                ErrorCode::Exhausted,
                "TOO_MANY_TOKENS",
                message,
            ));
        }
        let id = self.t.next_token;
        self.t.next_token = TokenId(id.0 + 1);
        let token = TokenRecord {
            id,
            secret_hash: wish.secret_hash,
            grant: wish.grant,
            created_by: wish.by,
            workspace: WorkspaceName::default_workspace(),
            created_at: now,
            expires_at: now.after(wish.ttl),
            uses_left: wish.uses,
            revoked: false,
        };
        self.t.insert_token(token.clone());
        Ok(Answer::TokenCreated(Box::new(token)))
    }

    pub(crate) fn on_token_revoked(&mut self, id: TokenId) -> Result<Answer, Refusal> {
        let Some(token) = self.t.tokens.get(&id) else {
            let message = format!("there is no token {id}; see `yard token list`");
            return Err(Refusal::new(ErrorCode::NotFound, "TOKEN_UNKNOWN", message));
        };
        if !token.revoked
            && let Some(token) = self.t.token_mut(id)
        {
            token.revoked = true;
        }
        Ok(Answer::Done)
    }

    /// The grant of a token that can be used now.
    fn check_token(
        &self,
        now: Timestamp,
        id: TokenId,
        secret_hash: Digest,
    ) -> Result<&TokenRecord, Refusal> {
        self.t
            .tokens
            .get(&id)
            .filter(|token| token.secret_hash == secret_hash && is_usable(token, now))
            .ok_or_else(bad_token)
    }

    fn use_token(&mut self, id: TokenId) {
        if let Some(token) = self.t.token_mut(id) {
            token.uses_left = token.uses_left.saturating_sub(1);
        }
    }

    pub(crate) fn on_node_enrolled(
        &mut self,
        now: Timestamp,
        token: TokenId,
        secret_hash: Digest,
        name: &str,
    ) -> Result<Answer, Refusal> {
        let record = self.check_token(now, token, secret_hash)?;
        let TokenGrant::Node { target } = record.grant else {
            return Err(bad_token());
        };
        let owner = record.created_by.clone();
        let node = self.add_node(now, name, target, owner)?;
        self.use_token(token);
        Ok(Answer::NodeEnrolled(Box::new(node)))
    }

    pub(crate) fn on_user_enrolled(
        &mut self,
        now: Timestamp,
        token: TokenId,
        secret_hash: Digest,
    ) -> Result<Answer, Refusal> {
        let TokenGrant::User { name, role } =
            self.check_token(now, token, secret_hash)?.grant.clone()
        else {
            return Err(bad_token());
        };
        self.use_token(token);
        Ok(self.upsert_user(now, name, role))
    }

    /// A user that the driver vouches for, or who came with a token: the last role counts.
    pub(crate) fn upsert_user(&mut self, now: Timestamp, name: UserName, role: Role) -> Answer {
        let user = match self.t.users.get(&name) {
            Some(known) => UserRecord {
                role,
                ..known.clone()
            },
            None => UserRecord {
                name,
                role,
                workspace: WorkspaceName::default_workspace(),
                created_at: now,
            },
        };
        if self.t.users.get(&user.name) != Some(&user) {
            self.t.insert_user(user.clone());
        }
        Answer::UserEnrolled(Box::new(user))
    }

    pub(crate) fn on_local_node(
        &mut self,
        now: Timestamp,
        name: &str,
        target: Target,
        owner: UserName,
    ) -> Result<Answer, Refusal> {
        let wanted = clean_name(name);
        let taken = self
            .t
            .nodes
            .values()
            .any(|node| node.name == wanted && node.target != target);
        let known = self.t.nodes.values().find(|node| {
            // Where another kind of node has the name, this one got it with a number.
            let number = || {
                node.name
                    .rsplit('-')
                    .next()
                    .and_then(|digits| digits.parse().ok())
            };
            let is_numbered =
                || taken && number().is_some_and(|n| numbered(&wanted, n) == node.name);
            node.target == target && (node.name == wanted || is_numbered())
        });
        let node = match known {
            Some(node) => node.clone(),
            None => self.add_node(now, name, target, owner)?,
        };
        Ok(Answer::NodeEnrolled(Box::new(node)))
    }

    fn add_node(
        &mut self,
        now: Timestamp,
        name: &str,
        target: Target,
        owner: UserName,
    ) -> Result<NodeRecord, Refusal> {
        if self.t.nodes.len() >= self.config.max_nodes {
            let message = format!(
                "the cluster has {} nodes, as many as it may have; remove one with `yard node remove`",
                self.t.nodes.len()
            );
            return Err(Refusal::new(
                ErrorCode::Exhausted,
                "TOO_MANY_NODES",
                message,
            ));
        }
        let id = self.t.next_node;
        self.t.next_node = NodeId(id.0 + 1);
        let node = NodeRecord {
            id,
            name: self.unique_name(name),
            owner,
            workspace: WorkspaceName::default_workspace(),
            target,
            availability: NodeAvailability::Unreachable,
            policy: NodePolicy::Active,
            reason: Reason::new(
                ReasonCode::Enrolled,
                format!("{id} is enrolled and was not seen yet"),
            ),
            inventory: Inventory::default(),
            incarnation: Incarnation(0),
            boot_id: String::new(),
            agent_version: String::new(),
            address: String::new(),
            enrolled_at: now,
            changed_at: now,
        };
        self.live.last_heard.insert(id, now);
        self.t.insert_node(node.clone());
        Ok(node)
    }

    fn unique_name(&self, name: &str) -> String {
        let wanted = clean_name(name);
        let is_taken = |name: &str| self.t.nodes.values().any(|node| node.name == name);
        if !is_taken(&wanted) {
            return wanted;
        }
        // One of this many must be free, for there are not more nodes.
        (2..=self.t.nodes.len() + 2)
            .map(|number| numbered(&wanted, number))
            .find(|name| !is_taken(name))
            .unwrap_or(wanted)
    }
}

/// The machine's name in the form that names have here.
fn clean_name(name: &str) -> String {
    let allowed = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) {
            c
        } else {
            '-'
        }
    };
    let cleaned: String = name.chars().map(allowed).collect();
    let cleaned: String = cleaned
        .trim_start_matches(|c: char| !c.is_ascii_alphanumeric())
        .chars()
        .take(MAX_NAME)
        .collect();
    if is_name(&cleaned) {
        cleaned
    } else {
        "node".to_owned()
    }
}

/// The name with a number behind it, cut so that it is still a name.
fn numbered(name: &str, number: usize) -> String {
    let suffix = format!("-{number}");
    let kept: String = name
        .chars()
        .take(MAX_NAME.saturating_sub(suffix.len()))
        .collect();
    kept + &suffix
}

fn is_usable(token: &TokenRecord, now: Timestamp) -> bool {
    !token.revoked && token.uses_left > 0 && now < token.expires_at
}

fn bad_token() -> Refusal {
    let message =
        "the token cannot be used: it is wrong, expired, revoked or used up; ask for a new one";
    Refusal::new(ErrorCode::Unauthenticated, "BAD_JOIN_TOKEN", message)
}

fn invalid(field: &str, message: String) -> Refusal {
    Refusal::new(
        ErrorCode::Invalid,
        "INVALID_FIELD",
        format!("{field}: {message}"),
    )
    .at(field)
}
