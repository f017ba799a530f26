//! The two sets that a session exchanges: what the coordinator wants of an agent, and what the agent observed.

use trainyard_common::member::{
    Cleanup, DesiredMember, DesiredPhase, Ending, Go, LeftProcess, MemberSpec, ObservedMember,
    ObservedPhase, Stop,
};

use super::job::reason_code;
use super::scalar::{
    digest_bytes, digest_list, digests, duration, list, optional_digest, optional_duration, port,
    required, text, timestamp, to_duration, to_timestamp,
};
use super::{InvalidField, WireEnum, enum_field};
use crate::v1;

impl From<&DesiredMember> for v1::DesiredMember {
    fn from(member: &DesiredMember) -> Self {
        use v1::desired_member::Phase;
        let DesiredMember {
            attempt,
            phase,
            spec,
        } = member;
        let phase = match phase {
            DesiredPhase::Prepare => Phase::Prepare(v1::Prepare { then_start: false }),
            DesiredPhase::Start => Phase::Prepare(v1::Prepare { then_start: true }),
            DesiredPhase::Run(go) => Phase::Run(go.into()),
            DesiredPhase::Stop(stop) => Phase::Stop(stop.into()),
        };
        Self {
            attempt: Some(attempt.into()),
            phase: Some(phase),
            spec: Some(spec.into()),
        }
    }
}

impl TryFrom<v1::DesiredMember> for DesiredMember {
    type Error = InvalidField;

    fn try_from(message: v1::DesiredMember) -> Result<Self, InvalidField> {
        use v1::desired_member::Phase;
        let v1::DesiredMember {
            attempt,
            phase,
            spec,
        } = message;
        let phase = match phase {
            Some(Phase::Prepare(v1::Prepare { then_start: false })) => DesiredPhase::Prepare,
            Some(Phase::Prepare(v1::Prepare { then_start: true })) => DesiredPhase::Start,
            Some(Phase::Run(go)) => DesiredPhase::Run(required("run", Some(go))?),
            Some(Phase::Stop(stop)) => DesiredPhase::Stop(required("stop", Some(stop))?),
            None => return Err(InvalidField::missing("phase")),
        };
        Ok(Self {
            attempt: required("attempt", attempt)?,
            phase,
            spec: required("spec", spec)?,
        })
    }
}

impl From<&Go> for v1::Go {
    fn from(go: &Go) -> Self {
        let Go {
            master_addr,
            master_port,
            node_addrs,
        } = go;
        Self {
            master_addr: master_addr.clone(),
            master_port: (*master_port).into(),
            node_addrs: node_addrs.clone(),
        }
    }
}

impl TryFrom<v1::Go> for Go {
    type Error = InvalidField;

    fn try_from(message: v1::Go) -> Result<Self, InvalidField> {
        let v1::Go {
            master_addr,
            master_port,
            node_addrs,
        } = message;
        Ok(Self {
            master_addr,
            master_port: port("master_port", master_port)?,
            node_addrs,
        })
    }
}

impl From<&Stop> for v1::Stop {
    fn from(stop: &Stop) -> Self {
        let Stop { code, grace } = *stop;
        Self {
            code: code.as_str().to_owned(),
            grace: Some(duration(grace)),
        }
    }
}

impl TryFrom<v1::Stop> for Stop {
    type Error = InvalidField;

    fn try_from(message: v1::Stop) -> Result<Self, InvalidField> {
        let v1::Stop { code, grace } = message;
        Ok(Self {
            code: reason_code("code", &code)?,
            grace: to_duration("grace", grace)?,
        })
    }
}

impl From<&MemberSpec> for v1::MemberSpec {
    fn from(spec: &MemberSpec) -> Self {
        let MemberSpec {
            job_name,
            owner,
            workspace,
            node_rank,
            nodes,
            procs_per_node,
            resources,
            gpu_uuids,
            launcher,
            command,
            env,
            snapshot,
            resume_from,
            time_limit,
            grace,
            lease,
        } = spec;
        Self {
            job_name: job_name.clone(),
            owner: owner.to_string(),
            workspace: workspace.to_string(),
            node_rank: *node_rank,
            nodes: *nodes,
            procs_per_node: *procs_per_node,
            resources: Some(resources.into()),
            gpu_uuids: gpu_uuids.clone(),
            launcher: launcher.number(),
            command: command.clone(),
            env: env.clone(),
            snapshot: digest_bytes(*snapshot),
            resume_from: digest_list(resume_from),
            time_limit: time_limit.map(duration),
            grace: Some(duration(*grace)),
            lease: lease.map(duration),
        }
    }
}

impl TryFrom<v1::MemberSpec> for MemberSpec {
    type Error = InvalidField;

    fn try_from(message: v1::MemberSpec) -> Result<Self, InvalidField> {
        let v1::MemberSpec {
            job_name,
            owner,
            workspace,
            node_rank,
            nodes,
            procs_per_node,
            resources,
            gpu_uuids,
            launcher,
            command,
            env,
            snapshot,
            resume_from,
            time_limit,
            grace,
            lease,
        } = message;
        Ok(Self {
            job_name,
            owner: text("owner", &owner)?,
            workspace: text("workspace", &workspace)?,
            node_rank,
            nodes,
            procs_per_node,
            resources: required("resources", resources)?,
            gpu_uuids,
            launcher: enum_field("launcher", launcher)?,
            command,
            env,
            snapshot: optional_digest("snapshot", &snapshot)?,
            resume_from: digests("resume_from", &resume_from)?,
            time_limit: optional_duration("time_limit", time_limit)?,
            grace: to_duration("grace", grace)?,
            lease: optional_duration("lease", lease)?,
        })
    }
}

impl From<&ObservedMember> for v1::ObservedMember {
    fn from(member: &ObservedMember) -> Self {
        use v1::observed_member::Phase;
        let ObservedMember {
            attempt,
            node_rank,
            phase,
        } = member;
        let phase = match phase {
            ObservedPhase::Preparing => Phase::Preparing(v1::PreparingPhase {}),
            ObservedPhase::Ready { port } => Phase::Ready(v1::ReadyPhase {
                port: (*port).into(),
            }),
            ObservedPhase::Running { started_at } => Phase::Running(v1::RunningPhase {
                started_at: Some(timestamp(*started_at)),
            }),
            ObservedPhase::Stopping => Phase::Stopping(v1::StoppingPhase { cleanup: None }),
            // To an older coordinator it is just being ended.
            ObservedPhase::CleanupPending(cleanup) => Phase::Stopping(v1::StoppingPhase {
                cleanup: Some(cleanup.into()),
            }),
            ObservedPhase::Uploading(ending) => Phase::Uploading(ending.into()),
            ObservedPhase::Ended(ending) => Phase::Ended(ending.into()),
        };
        Self {
            attempt: Some(attempt.into()),
            node_rank: *node_rank,
            phase: Some(phase),
        }
    }
}

impl TryFrom<v1::ObservedMember> for ObservedMember {
    type Error = InvalidField;

    fn try_from(message: v1::ObservedMember) -> Result<Self, InvalidField> {
        let v1::ObservedMember {
            attempt,
            node_rank,
            phase,
        } = message;
        Ok(Self {
            attempt: required("attempt", attempt)?,
            node_rank,
            phase: observed_phase(phase.ok_or_else(|| InvalidField::missing("phase"))?)?,
        })
    }
}

fn observed_phase(phase: v1::observed_member::Phase) -> Result<ObservedPhase, InvalidField> {
    use v1::observed_member::Phase;
    Ok(match phase {
        Phase::Preparing(v1::PreparingPhase {}) => ObservedPhase::Preparing,
        Phase::Ready(v1::ReadyPhase { port: number }) => ObservedPhase::Ready {
            port: port("ready.port", number)?,
        },
        Phase::Running(v1::RunningPhase { started_at }) => ObservedPhase::Running {
            started_at: to_timestamp("running.started_at", started_at)?,
        },
        Phase::Stopping(v1::StoppingPhase { cleanup: None }) => ObservedPhase::Stopping,
        Phase::Stopping(v1::StoppingPhase { cleanup }) => {
            ObservedPhase::CleanupPending(required("stopping.cleanup", cleanup)?)
        }
        Phase::Uploading(ending) => ObservedPhase::Uploading(required("uploading", Some(ending))?),
        Phase::Ended(ending) => ObservedPhase::Ended(required("ended", Some(ending))?),
    })
}

impl From<&Cleanup> for v1::Cleanup {
    fn from(cleanup: &Cleanup) -> Self {
        let Cleanup { ending, left, more } = cleanup;
        let left = left.iter().map(|process| {
            let LeftProcess { pid, state, name } = process;
            v1::LeftProcess {
                pid: *pid,
                state: state.to_string(),
                name: name.clone(),
            }
        });
        Self {
            ending: Some(ending.into()),
            left: left.collect(),
            more: *more,
        }
    }
}

impl TryFrom<v1::Cleanup> for Cleanup {
    type Error = InvalidField;

    fn try_from(cleanup: v1::Cleanup) -> Result<Self, InvalidField> {
        let v1::Cleanup { ending, left, more } = cleanup;
        Ok(Self {
            ending: required("ending", ending)?,
            left: list("left", left)?,
            more,
        })
    }
}

impl TryFrom<v1::LeftProcess> for LeftProcess {
    type Error = InvalidField;

    fn try_from(process: v1::LeftProcess) -> Result<Self, InvalidField> {
        let v1::LeftProcess { pid, state, name } = process;
        let mut letters = state.chars();
        match (letters.next(), letters.next()) {
            (Some(state), None) if state.is_ascii_alphabetic() => Ok(Self { pid, state, name }),
            _ => Err(InvalidField::new("state", "is not one letter")),
        }
    }
}

impl From<&Ending> for v1::Ending {
    fn from(ending: &Ending) -> Self {
        let Ending {
            cause,
            message,
            started,
            ranks,
            ended_at,
            outputs,
            checkpoint,
            warning,
        } = ending;
        Self {
            cause: cause.number(),
            message: message.clone(),
            started: *started,
            ranks: ranks.iter().map(Into::into).collect(),
            ended_at: Some(timestamp(*ended_at)),
            outputs: digest_bytes(*outputs),
            checkpoint: digest_bytes(*checkpoint),
            warning: warning.clone(),
        }
    }
}

impl TryFrom<v1::Ending> for Ending {
    type Error = InvalidField;

    fn try_from(ending: v1::Ending) -> Result<Self, InvalidField> {
        let v1::Ending {
            cause,
            message,
            started,
            ranks,
            ended_at,
            outputs,
            checkpoint,
            warning,
        } = ending;
        Ok(Self {
            cause: enum_field("cause", cause)?,
            message,
            started,
            ranks: list("ranks", ranks)?,
            ended_at: to_timestamp("ended_at", ended_at)?,
            outputs: optional_digest("outputs", &outputs)?,
            checkpoint: optional_digest("checkpoint", &checkpoint)?,
            warning,
        })
    }
}

#[cfg(test)]
mod tests {
    use v1::observed_member::Phase;

    use super::*;

    fn observed(phase: Option<Phase>) -> Result<ObservedMember, String> {
        let message = v1::ObservedMember {
            attempt: Some(v1::AttemptRef {
                job: 1,
                task: 0,
                attempt: 1,
            }),
            node_rank: 0,
            phase,
        };
        ObservedMember::try_from(message).map_err(|e| e.to_string())
    }

    #[test]
    fn a_bad_phase_is_named_by_the_path_that_the_file_has() {
        assert_eq!(observed(None), Err("phase: is missing".into()));
        let ready = |port| observed(Some(Phase::Ready(v1::ReadyPhase { port })));
        assert_eq!(ready(0), Err("ready.port: is missing".into()));
        assert!(ready(65_536).is_err_and(|e| e.starts_with("ready.port: 65536 is not a port")));
        let running = observed(Some(Phase::Running(v1::RunningPhase { started_at: None })));
        assert_eq!(running, Err("running.started_at: is missing".into()));
        let ended = observed(Some(Phase::Ended(v1::Ending::default())));
        assert!(ended.is_err_and(|e| e.starts_with("ended.cause: ")));
    }

    #[test]
    fn a_stop_needs_its_code_and_its_grace() {
        let field_of = |code: &str, grace| {
            let stop = v1::Stop {
                code: code.to_owned(),
                grace,
            };
            Stop::try_from(stop).expect_err("incomplete").field
        };
        let grace = Some(prost_types::Duration::default());
        assert_eq!(field_of("", grace), "code");
        assert_eq!(field_of("BECAUSE", grace), "code");
        assert_eq!(field_of("CANCEL_REQUESTED", None), "grace");
    }
}
