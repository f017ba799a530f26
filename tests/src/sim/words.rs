//! What happened, in a line each, for the trace that a failing seed prints.

use trainyard_common::record::Record;
use trainyard_coordinator_core::event::Event;

use super::agent::phase_name;

/// An event in a line.
pub(crate) fn short(event: &Event) -> String {
    match event {
        Event::JobSubmitted {
            request_id, spec, ..
        } => format!(
            "submit {} nodes {} array {:?}",
            request_id.as_str(),
            spec.nodes,
            spec.array.map(|array| (array.first, array.last))
        ),
        Event::CancelRequested { job, .. } => format!("cancel {job}"),
        Event::AgentRegistered(reg) => {
            let members: Vec<String> = reg
                .observed
                .iter()
                .map(|member| format!("{} {}", member.attempt, phase_name(&member.phase)))
                .collect();
            format!(
                "hello of {} start {} {}: {}",
                reg.node,
                reg.incarnation,
                reg.boot_id,
                members.join(", ")
            )
        }
        Event::MemberObserved {
            session,
            node,
            member,
        } => format!(
            "{node} (session {}): {} {}",
            session.0,
            member.attempt,
            phase_name(&member.phase)
        ),
        Event::SessionEnded { session, node } => format!("end of session {} of {node}", session.0),
        Event::NodePolicySet { node, policy, .. } => format!("{node} to be {policy}"),
        Event::NodeRemoved { node, .. } => format!("removal of {node}"),
        Event::NodeConfirmedLost { node, .. } => format!("{node} confirmed lost"),
        other => format!("{other:?}").chars().take(120).collect(),
    }
}

/// A row in a line.
pub(crate) fn short_row(record: &Record) -> String {
    match record {
        Record::Job(job) => format!("{} {} ({})", job.id, job.state, job.reason.message),
        Record::Task(task) => format!("{}.{} {}", task.job, task.index, task.state),
        Record::Attempt(attempt) => {
            let members: Vec<String> = attempt
                .members
                .iter()
                .map(|member| format!("{} {}", member.node, member.phase))
                .collect();
            format!(
                "{} {} {:?} [{}] ({})",
                attempt.id,
                attempt.state,
                attempt.outcome,
                members.join(", "),
                attempt.reason.message
            )
        }
        Record::Node(node) => format!("{} {} {}", node.id, node.availability, node.policy),
        Record::NodeRemoved(node) => format!("{node} removed"),
        Record::Token(token) => format!("{}", token.id),
        Record::User(user) => user.name.as_str().to_owned(),
        Record::Bundle(bundle) => format!("{} {}", bundle.id, bundle.state),
        Record::BundleRemoved(bundle) => format!("{bundle} removed"),
    }
}
