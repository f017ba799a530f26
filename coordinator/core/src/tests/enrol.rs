//! Join tokens, nodes and users.

use std::time::Duration;

use trainyard_common::ids::{Digest, NodeId, TokenId};
use trainyard_common::limits;
use trainyard_common::record::{Role, Target, TokenGrant};

use crate::Config;
use crate::effect::Effect;
use crate::event::Event;
use crate::testing::{TestEnv, user};

const SECRET: Digest = Digest([1; 32]);
const HOUR: Duration = Duration::from_secs(3600);
const NODE: TokenGrant = TokenGrant::Node {
    target: Target::Attached,
};

fn token(env: &mut TestEnv, grant: TokenGrant, uses: u32, ttl: Duration) {
    let key = env.key();
    env.event(Event::TokenRequested {
        key,
        by: user("root"),
        secret_hash: SECRET,
        grant,
        uses,
        ttl,
    });
}

fn join(env: &mut TestEnv, token: u64, secret_hash: Digest, name: &str) {
    let key = env.key();
    env.event(Event::NodeEnrolled {
        key,
        token: TokenId(token),
        secret_hash,
        name: name.into(),
    });
}

fn login(env: &mut TestEnv, token: u64) {
    let key = env.key();
    env.event(Event::UserEnrolled {
        key,
        token: TokenId(token),
        secret_hash: SECRET,
    });
}

fn local(env: &mut TestEnv, name: &str, target: Target) {
    let key = env.key();
    env.event(Event::LocalNodeAdded {
        key,
        name: name.into(),
        target,
        owner: user("root"),
    });
}

#[test]
fn a_token_is_good_for_as_many_machines_as_it_says() {
    let mut env = TestEnv::new();
    token(&mut env, NODE, 2, HOUR);
    env.expect_all(&["t1 uses 2 revoked false"], &["token t1"]);
    join(&mut env, 1, SECRET, "gpu");
    env.expect_all(
        &["t1 uses 1 revoked false", "n1 UNREACHABLE ACTIVE ENROLLED"],
        &["enrolled n1 gpu"],
    );
    env.restart();
    join(&mut env, 1, SECRET, "gpu");
    env.expect(&["enrolled n2 gpu-2"]);
    join(&mut env, 1, SECRET, "gpu");
    env.expect_all(
        &["t1 uses 0 revoked false", "n2 UNREACHABLE ACTIVE ENROLLED"][..0],
        &["refused UNAUTHENTICATED BAD_JOIN_TOKEN"],
    );
}

#[test]
fn every_bad_token_is_refused_in_the_same_words() {
    let mut env = TestEnv::new();
    token(&mut env, NODE, 1, HOUR);
    token(
        &mut env,
        TokenGrant::User {
            name: user("eve"),
            role: Role::User,
        },
        1,
        HOUR,
    );
    token(&mut env, NODE, 1, HOUR);
    let key = env.key();
    env.event(Event::TokenRevoked {
        key,
        token: TokenId(3),
    });
    env.words();
    join(&mut env, 1, Digest([2; 32]), "a"); // Wrong secret.
    join(&mut env, 9, SECRET, "a"); // No such token.
    join(&mut env, 2, SECRET, "a"); // For a user.
    join(&mut env, 3, SECRET, "a"); // Revoked.
    login(&mut env, 1); // For a node.
    env.now = env.now.after(HOUR);
    join(&mut env, 1, SECRET, "a"); // Expired.
    assert!(env.rows.is_empty(), "{:?}", env.rows);
    let mut messages: Vec<String> = env
        .said
        .drain(..)
        .map(|effect| {
            let Effect::Reply(_, Err(refusal)) = effect else {
                panic!("{effect:?}")
            };
            format!("{refusal:?}")
        })
        .collect();
    assert_eq!(messages.len(), 6);
    messages.dedup();
    assert_eq!(messages.len(), 1, "{messages:?}");
}

#[test]
fn limits_of_a_token_are_met_at_the_bound() {
    let mut env = TestEnv::new();
    token(&mut env, NODE, 0, HOUR);
    token(&mut env, NODE, limits::MAX_TOKEN_USES + 1, HOUR);
    token(&mut env, NODE, 1, Duration::ZERO);
    token(
        &mut env,
        NODE,
        1,
        limits::MIN_TOKEN_TTL - Duration::from_millis(1),
    );
    token(
        &mut env,
        NODE,
        1,
        limits::MAX_TOKEN_TTL + Duration::from_millis(1),
    );
    env.expect_all(&[], &["refused INVALID INVALID_FIELD"; 5]);
    token(
        &mut env,
        NODE,
        limits::MAX_TOKEN_USES,
        limits::MAX_TOKEN_TTL,
    );
    token(&mut env, NODE, 1, limits::MIN_TOKEN_TTL);
    env.expect(&["token t1", "token t2"]);
}

#[test]
fn tokens_that_cannot_be_used_make_room() {
    let mut env = TestEnv::with(Config {
        max_tokens: 2,
        ..Config::default()
    });
    token(&mut env, NODE, 1, HOUR);
    token(&mut env, NODE, 1, HOUR);
    token(&mut env, NODE, 1, HOUR);
    env.expect(&["token t1", "token t2", "refused EXHAUSTED TOO_MANY_TOKENS"]);
    join(&mut env, 1, SECRET, "a");
    token(&mut env, NODE, 1, HOUR);
    env.expect(&["enrolled n1 a", "token t3"]);
    env.now = env.now.after(HOUR);
    token(&mut env, NODE, 1, HOUR);
    env.expect(&["token t4"]);
}

#[test]
fn revoking_is_final_and_may_be_repeated() {
    let mut env = TestEnv::new();
    token(&mut env, NODE, 1, HOUR);
    env.words();
    for rows in [&["t1 uses 1 revoked true"][..], &[]] {
        let key = env.key();
        env.event(Event::TokenRevoked {
            key,
            token: TokenId(1),
        });
        env.expect_all(rows, &["done"]);
    }
    let key = env.key();
    env.event(Event::TokenRevoked {
        key,
        token: TokenId(5),
    });
    env.expect_all(&[], &["refused NOT_FOUND TOKEN_UNKNOWN"]);
}

#[test]
fn the_cluster_has_room_for_so_many_nodes() {
    let mut env = TestEnv::with(Config {
        max_nodes: 1,
        ..Config::default()
    });
    token(&mut env, NODE, 5, HOUR);
    join(&mut env, 1, SECRET, "a");
    join(&mut env, 1, SECRET, "b");
    env.expect(&[
        "token t1",
        "enrolled n1 a",
        "refused EXHAUSTED TOO_MANY_NODES",
    ]);
    assert_eq!(
        env.core.token(TokenId(1)).unwrap().uses_left,
        4,
        "a refusal uses nothing up"
    );
}

#[test]
fn names_are_made_fit_and_unique() {
    let mut env = TestEnv::new();
    let long = "x".repeat(70);
    for name in ["host one", "host-one", "", "../..", &long, &long] {
        local(&mut env, name, Target::Attached);
        local(&mut env, name, Target::Local);
    }
    env.words();
    let names: Vec<&str> = env.core.nodes().map(|node| node.name.as_str()).collect();
    let (cut, second) = ("x".repeat(63), "x".repeat(61) + "-2");
    assert_eq!(
        names,
        ["host-one", "host-one-2", "node", "node-2", &cut, &second]
    );
}

#[test]
fn a_local_node_is_the_same_again() {
    let mut env = TestEnv::new();
    local(&mut env, "box", Target::Attached);
    local(&mut env, "box", Target::Local);
    local(&mut env, "box", Target::Local);
    env.expect(&["enrolled n1 box", "enrolled n2 box-2", "enrolled n2 box-2"]);
    assert_eq!(env.core.node(NodeId(2)).unwrap().target, Target::Local);
}

#[test]
fn a_user_gets_the_role_of_the_newest_token() {
    let mut env = TestEnv::new();
    token(
        &mut env,
        TokenGrant::User {
            name: user("eve"),
            role: Role::User,
        },
        1,
        HOUR,
    );
    token(
        &mut env,
        TokenGrant::User {
            name: user("eve"),
            role: Role::Operator,
        },
        1,
        HOUR,
    );
    login(&mut env, 1);
    login(&mut env, 2);
    login(&mut env, 2);
    env.expect(&[
        "token t1",
        "token t2",
        "enrolled eve user",
        "enrolled eve operator",
        "refused UNAUTHENTICATED BAD_JOIN_TOKEN",
    ]);
    let key = env.key();
    env.event(Event::LocalUserAdded {
        key,
        name: user("root"),
        role: Role::Admin,
    });
    env.expect_all(&["root admin"], &["enrolled root admin"]);
    let key = env.key();
    env.event(Event::LocalUserAdded {
        key,
        name: user("root"),
        role: Role::Admin,
    });
    env.expect_all(&[], &["enrolled root admin"]);
}
