//! What is sent is what arrives, for every domain type, through the encoded bytes.

use std::fmt::Debug;

use proptest::prelude::*;
use prost::Message;
use trainyard_common::bundle::{DesiredBundle, ObservedBundle};
use trainyard_common::ids::AttemptRef;
use trainyard_common::inventory::Inventory;
use trainyard_common::member::{DesiredMember, ObservedMember, RankEnd};
use trainyard_common::record::{
    AttemptRecord, BundleRecord, JobRecord, NodeRecord, Record, TaskRecord, TokenRecord, UserRecord,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::{ExitStatus, Reason};
use trainyard_common::time::Timestamp;
use trainyard_proto::convert::InvalidField;
use trainyard_proto::{convert, v1};

use crate::strategies;

fn survives<Wire, Domain>(value: &Domain) -> Result<(), TestCaseError>
where
    Wire: Message + Default + for<'a> From<&'a Domain>,
    Domain: TryFrom<Wire, Error = InvalidField> + PartialEq + Debug,
{
    let bytes = Wire::from(value).encode_to_vec();
    let wire = Wire::decode(bytes.as_slice()).expect("was just encoded");
    let back = Domain::try_from(wire).map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert_eq!(&back, value);
    prop_assert_eq!(
        Wire::from(&back).encode_to_vec(),
        bytes,
        "not deterministic"
    );
    Ok(())
}

macro_rules! round_trips {
    ($($test:ident: $domain:ty => $wire:ty, $strategy:expr;)+) => {
        proptest! {
            $(#[test]
            fn $test(value in $strategy) {
                survives::<$wire, $domain>(&value)?;
            })+
        }
    };
}

round_trips! {
    attempt_refs: AttemptRef => v1::AttemptRef, strategies::attempt_ref();
    resources: Resources => v1::Resources, strategies::resources();
    reasons: Reason => v1::Reason, strategies::reason();
    exit_statuses: ExitStatus => v1::ExitStatus, strategies::exit();
    rank_ends: RankEnd => v1::RankEnd, strategies::rank_end();
    job_specs: JobSpec => v1::JobSpec, strategies::job_spec();
    inventories: Inventory => v1::Inventory, strategies::inventory();
    jobs: JobRecord => v1::Job, strategies::job();
    tasks: TaskRecord => v1::Task, strategies::task();
    attempts: AttemptRecord => v1::Attempt, strategies::attempt();
    nodes: NodeRecord => v1::Node, strategies::node();
    tokens: TokenRecord => v1::Token, strategies::token();
    users: UserRecord => v1::User, strategies::user_record();
    desired_members: DesiredMember => v1::DesiredMember, strategies::desired();
    observed_members: ObservedMember => v1::ObservedMember, strategies::observed();
    bundles: BundleRecord => v1::Bundle, strategies::bundle_record();
    desired_bundles: DesiredBundle => v1::DesiredBundle, strategies::desired_bundle();
    observed_bundles: ObservedBundle => v1::ObservedBundle, strategies::observed_bundle();
}

proptest! {
    #[test]
    fn transitions(ms: u64, record in strategies::record()) {
        let at = Timestamp(ms);
        let bytes = v1::Transition::from((at, &record)).encode_to_vec();
        let wire = v1::Transition::decode(bytes.as_slice()).expect("was just encoded");
        prop_assert_eq!(<(Timestamp, Record)>::try_from(wire), Ok((at, record)));
    }

    #[test]
    fn a_token_for_users_says_all_but_the_hash(token in strategies::token()) {
        let shown = convert::without_secret(&token);
        prop_assert!(shown.secret_hash.is_empty());
        let whole = v1::Token { secret_hash: token.secret_hash.0.to_vec(), ..shown };
        prop_assert_eq!(TokenRecord::try_from(whole), Ok(token));
    }

    /// Bytes from somebody else may decode to any message; converting it may refuse, and never panics.
    #[test]
    fn damaged_messages_do_not_panic(
        record in strategies::record(),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = v1::Transition::from((Timestamp(1), &record)).encode_to_vec();
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Ok(wire) = v1::Transition::decode(bytes.as_slice()) {
            let _ = <(Timestamp, Record)>::try_from(wire);
        }
    }
}
