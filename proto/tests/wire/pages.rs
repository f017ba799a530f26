//! Sets in pages: whole or not at all.

use proptest::prelude::*;
use prost::Message;
use trainyard_common::ids::{AttemptNumber, AttemptRef, JobId, TaskIndex};
use trainyard_common::limits::{MAX_MEMBERS_PER_NODE, MAX_MESSAGE, PAGE_BYTES};
use trainyard_common::member::{
    DesiredMember, DesiredPhase, MemberSpec, ObservedMember, ObservedPhase,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::Launcher;
use trainyard_proto::convert::pages::{Assembler, PageError, Paged, desired_pages, observed_pages};
use trainyard_proto::v1;

use crate::strategies;

fn attempt(number: u64) -> AttemptRef {
    AttemptRef {
        job: JobId(number),
        task: TaskIndex(0),
        attempt: AttemptNumber(1),
    }
}

fn observed(count: u64) -> Vec<ObservedMember> {
    let member = |number| ObservedMember {
        attempt: attempt(number),
        node_rank: 0,
        phase: ObservedPhase::Preparing,
    };
    (1..=count).map(member).collect()
}

/// Members with an argument of this size.
fn desired(count: u64, argument_bytes: usize) -> Vec<DesiredMember> {
    let spec = MemberSpec {
        job_name: "train".into(),
        owner: "ada".parse().expect("is a name"),
        workspace: "default".parse().expect("is a name"),
        node_rank: 0,
        nodes: 1,
        procs_per_node: 1,
        resources: Resources::default(),
        gpu_uuids: vec![],
        launcher: Launcher::None,
        command: vec!["x".repeat(argument_bytes)],
        env: Default::default(),
        snapshot: None,
        resume_from: vec![],
        time_limit: None,
        grace: Default::default(),
        lease: None,
    };
    let member = |number| DesiredMember {
        attempt: attempt(number),
        phase: DesiredPhase::Prepare,
        spec: spec.clone(),
    };
    (1..=count).map(member).collect()
}

fn assemble<T: Paged>(pages: Vec<T::Page>) -> Result<Option<Vec<T>>, PageError> {
    let mut assembler = Assembler::new();
    let mut last = None;
    for page in pages {
        assert!(last.is_none(), "the set was complete before its last page");
        last = assembler.push(page)?;
    }
    Ok(last)
}

/// The same members in pages of one, with this end.
fn single_pages(members: &[ObservedMember], end: v1::SetEnd) -> Vec<v1::ObservedPage> {
    let page = |member: &ObservedMember| v1::ObservedPage {
        members: vec![member.into()],
        end: None,
    };
    let mut pages: Vec<_> = members.iter().map(page).collect();
    pages.push(v1::ObservedPage {
        members: vec![],
        end: Some(end),
    });
    pages
}

fn end_of(members: &[ObservedMember]) -> v1::SetEnd {
    observed_pages(members)
        .pop()
        .and_then(|page| page.end)
        .expect("the last page has the end")
}

#[test]
fn an_empty_set_is_one_page_with_its_end() {
    let pages = observed_pages(&[]);
    assert_eq!(pages.len(), 1);
    let end = v1::SetEnd {
        count: 0,
        digest: 0,
    };
    assert_eq!(pages[0].end, Some(end));
    assert_eq!(assemble::<ObservedMember>(pages), Ok(Some(vec![])));
}

#[test]
fn pages_are_closed_in_time_and_the_set_comes_back_whole() {
    let members = desired(10, 400 << 10);
    let pages = desired_pages(&members);
    let sizes: Vec<_> = pages.iter().map(|page| page.members.len()).collect();
    assert_eq!(sizes, [3, 3, 3, 1], "three reach {PAGE_BYTES} bytes");
    assert!(pages.iter().all(|page| page.encoded_len() < MAX_MESSAGE));
    let ends: Vec<_> = pages.iter().map(|page| page.end.is_some()).collect();
    assert_eq!(ends, [false, false, false, true]);
    assert_eq!(assemble(pages), Ok(Some(members)));
}

#[test]
fn a_set_does_not_depend_on_where_it_is_cut() {
    let members = observed(5);
    let pages = single_pages(&members, end_of(&members));
    assert_eq!(assemble(pages), Ok(Some(members)));
}

#[test]
fn a_lost_or_changed_member_is_noticed() {
    let members = observed(5);
    let end = end_of(&members);
    let mut lost = single_pages(&members, end);
    lost.remove(2);
    let count = PageError::Count {
        announced: 5,
        found: 4,
    };
    assert_eq!(assemble::<ObservedMember>(lost), Err(count));
    let mut swapped = single_pages(&members, end);
    swapped.swap(1, 2);
    let refused = assemble::<ObservedMember>(swapped);
    assert!(
        matches!(refused, Err(PageError::Digest { .. })),
        "{refused:?}"
    );
    let mut changed = single_pages(&members, end);
    let attempt = changed[3].members[0].attempt.as_mut();
    attempt.expect("a member names its attempt").attempt += 1;
    let refused = assemble::<ObservedMember>(changed);
    assert!(
        matches!(refused, Err(PageError::Digest { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_set_without_its_end_is_not_given_out() {
    let members = observed(3);
    let mut pages = single_pages(&members, end_of(&members));
    pages.pop();
    assert_eq!(assemble::<ObservedMember>(pages), Ok(None));
}

#[test]
fn doubled_empty_late_and_unreadable_pages_are_refused() {
    let members = observed(2);
    let end = end_of(&members);
    let pages = single_pages(&members, end);

    let doubled = vec![pages[0].clone(), pages[0].clone()];
    let refused = assemble::<ObservedMember>(doubled);
    assert_eq!(refused, Err(PageError::Duplicate(attempt(1).to_string())));

    let mut assembler = Assembler::<ObservedMember>::new();
    let empty = v1::ObservedPage::default();
    assert_eq!(assembler.push(empty), Err(PageError::Empty));

    let mut assembler = Assembler::<ObservedMember>::new();
    for page in pages.iter().cloned() {
        assembler.push(page).expect("the set is good");
    }
    assert_eq!(assembler.push(pages[0].clone()), Err(PageError::AfterEnd));

    let mut bad = pages;
    bad[1].members[0].phase = None;
    match assemble::<ObservedMember>(bad) {
        Err(PageError::Member(invalid)) => assert_eq!(invalid.field, "members[1].phase"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_set_has_a_bound() {
    let limit = MAX_MEMBERS_PER_NODE;
    let full = observed(limit as u64);
    let taken = assemble::<ObservedMember>(observed_pages(&full)).expect("is at the limit");
    assert_eq!(taken.map(|set| set.len()), Some(limit));
    let over = observed(limit as u64 + 1);
    let refused = assemble::<ObservedMember>(observed_pages(&over));
    assert_eq!(refused, Err(PageError::TooMany { limit }));
    let one_by_one = assemble::<ObservedMember>(single_pages(&over, end_of(&over)));
    assert_eq!(one_by_one, Err(PageError::TooMany { limit }));
}

proptest! {
    #[test]
    fn any_set_survives(members in proptest::collection::vec(strategies::observed(), 0..20)) {
        let mut members = members;
        members.sort_by_key(|member| member.attempt);
        members.dedup_by_key(|member| member.attempt);
        prop_assert_eq!(assemble(observed_pages(&members)), Ok(Some(members)));
    }
}
