//! Bundles: what the coordinator wants of them, what the agent observed, and the stored row.

use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, MAX_RANGES, MAX_REPORTS, ObservedBundle, ObservedBundlePhase,
    TaskRange, TaskReport, TaskSet,
};
use trainyard_common::ids::{BundleRef, TaskIndex};
use trainyard_common::record::BundleRecord;

use super::scalar::{
    job_id, list, node_id, optional, optional_timestamp, required, text, timestamp, to_timestamp,
};
use super::{InvalidField, WireEnum, enum_field};
use crate::v1;

impl From<&BundleRef> for v1::BundleRef {
    fn from(bundle: &BundleRef) -> Self {
        let BundleRef { job, bundle } = *bundle;
        Self { job: job.0, bundle }
    }
}

impl From<BundleRef> for v1::BundleRef {
    fn from(bundle: BundleRef) -> Self {
        (&bundle).into()
    }
}

impl TryFrom<v1::BundleRef> for BundleRef {
    type Error = InvalidField;

    fn try_from(message: v1::BundleRef) -> Result<Self, InvalidField> {
        let v1::BundleRef { job, bundle } = message;
        if bundle == 0 {
            return Err(InvalidField::new(
                "bundle",
                "is missing; bundles count from 1",
            ));
        }
        Ok(Self {
            job: job_id("job", job)?,
            bundle,
        })
    }
}

impl From<&TaskRange> for v1::TaskRange {
    fn from(range: &TaskRange) -> Self {
        let TaskRange { first, last } = *range;
        Self {
            first: first.0,
            last: last.0,
        }
    }
}

impl TryFrom<v1::TaskRange> for TaskRange {
    type Error = InvalidField;

    fn try_from(message: v1::TaskRange) -> Result<Self, InvalidField> {
        let v1::TaskRange { first, last } = message;
        if last < first {
            let problem = format!("is {last}, less than first, which is {first}");
            return Err(InvalidField::new("last", problem));
        }
        Ok(Self {
            first: TaskIndex(first),
            last: TaskIndex(last),
        })
    }
}

fn ranges(tasks: &TaskSet) -> Vec<v1::TaskRange> {
    tasks.ranges().iter().map(Into::into).collect()
}

fn task_set(field: &str, wire: Vec<v1::TaskRange>) -> Result<TaskSet, InvalidField> {
    if wire.len() > MAX_RANGES {
        let problem = format!("has {} ranges; at most {MAX_RANGES} are taken", wire.len());
        return Err(InvalidField::new(field, problem));
    }
    Ok(list::<_, TaskRange>(field, wire)?.into_iter().collect())
}

impl From<&DesiredBundle> for v1::DesiredBundle {
    fn from(desired: &DesiredBundle) -> Self {
        use v1::desired_bundle::Phase;
        let DesiredBundle {
            bundle,
            slots,
            phase,
            tasks,
            recorded,
            spec,
        } = desired;
        let phase = match phase {
            BundlePhase::Run => Phase::Run(v1::RunBundle {}),
            BundlePhase::Close => Phase::Close(v1::CloseBundle {}),
            BundlePhase::Stop(stop) => Phase::Stop(stop.into()),
        };
        Self {
            bundle: Some(bundle.into()),
            slots: *slots,
            phase: Some(phase),
            tasks: ranges(tasks),
            recorded: *recorded,
            spec: spec.as_deref().map(Into::into),
        }
    }
}

impl TryFrom<v1::DesiredBundle> for DesiredBundle {
    type Error = InvalidField;

    fn try_from(message: v1::DesiredBundle) -> Result<Self, InvalidField> {
        use v1::desired_bundle::Phase;
        let v1::DesiredBundle {
            bundle,
            slots,
            phase,
            tasks,
            recorded,
            spec,
        } = message;
        let phase = match phase {
            Some(Phase::Run(v1::RunBundle {})) => BundlePhase::Run,
            Some(Phase::Close(v1::CloseBundle {})) => BundlePhase::Close,
            Some(Phase::Stop(stop)) => BundlePhase::Stop(required("stop", Some(stop))?),
            None => return Err(InvalidField::missing("phase")),
        };
        Ok(Self {
            bundle: required("bundle", bundle)?,
            slots: positive("slots", slots)?,
            phase,
            tasks: task_set("tasks", tasks)?,
            recorded,
            spec: optional("spec", spec)?.map(Box::new),
        })
    }
}

fn positive(field: &str, number: u32) -> Result<u32, InvalidField> {
    match number {
        0 => Err(InvalidField::missing(field)),
        number => Ok(number),
    }
}

impl From<&ObservedBundle> for v1::ObservedBundle {
    fn from(observed: &ObservedBundle) -> Self {
        use v1::observed_bundle::Phase;
        let ObservedBundle {
            bundle,
            phase,
            first,
            reports,
        } = observed;
        let phase = match phase {
            ObservedBundlePhase::Preparing => Phase::Preparing(v1::PreparingPhase {}),
            ObservedBundlePhase::Running => Phase::Running(v1::RunningBundle {}),
            ObservedBundlePhase::Ended { message, total } => Phase::Ended(v1::EndedBundle {
                message: message.clone(),
                total: *total,
            }),
        };
        Self {
            bundle: Some(bundle.into()),
            phase: Some(phase),
            first: *first,
            reports: reports.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::ObservedBundle> for ObservedBundle {
    type Error = InvalidField;

    fn try_from(message: v1::ObservedBundle) -> Result<Self, InvalidField> {
        use v1::observed_bundle::Phase;
        let v1::ObservedBundle {
            bundle,
            phase,
            first,
            reports,
        } = message;
        let phase = match phase {
            Some(Phase::Preparing(v1::PreparingPhase {})) => ObservedBundlePhase::Preparing,
            Some(Phase::Running(v1::RunningBundle {})) => ObservedBundlePhase::Running,
            Some(Phase::Ended(v1::EndedBundle { message, total })) => {
                ObservedBundlePhase::Ended { message, total }
            }
            None => return Err(InvalidField::missing("phase")),
        };
        if reports.len() > MAX_REPORTS {
            let problem = format!(
                "has {} entries; at most {MAX_REPORTS} are taken",
                reports.len()
            );
            return Err(InvalidField::new("reports", problem));
        }
        Ok(Self {
            bundle: required("bundle", bundle)?,
            phase,
            first,
            reports: list("reports", reports)?,
        })
    }
}

impl From<&TaskReport> for v1::TaskReport {
    fn from(report: &TaskReport) -> Self {
        use v1::task_report::Report;
        let report = match report {
            TaskReport::Started { task, at } => Report::Started(v1::TaskStarted {
                task: task.0,
                at: Some(timestamp(*at)),
            }),
            TaskReport::Ended {
                task,
                started_at,
                ending,
            } => Report::Ended(v1::TaskEnded {
                task: task.0,
                started_at: started_at.map(timestamp),
                ending: Some(ending.as_ref().into()),
            }),
            TaskReport::Returned(range) => Report::Returned(range.into()),
        };
        Self {
            report: Some(report),
        }
    }
}

impl TryFrom<v1::TaskReport> for TaskReport {
    type Error = InvalidField;

    fn try_from(message: v1::TaskReport) -> Result<Self, InvalidField> {
        use v1::task_report::Report;
        let v1::TaskReport { report } = message;
        Ok(match report {
            Some(Report::Started(v1::TaskStarted { task, at })) => Self::Started {
                task: TaskIndex(task),
                at: to_timestamp("started.at", at)?,
            },
            Some(Report::Ended(v1::TaskEnded {
                task,
                started_at,
                ending,
            })) => Self::Ended {
                task: TaskIndex(task),
                started_at: optional_timestamp("ended.started_at", started_at)?,
                ending: Box::new(required("ended.ending", ending)?),
            },
            Some(Report::Returned(range)) => Self::Returned(required("returned", Some(range))?),
            None => return Err(InvalidField::missing("report")),
        })
    }
}

impl From<&BundleRecord> for v1::Bundle {
    fn from(record: &BundleRecord) -> Self {
        let BundleRecord {
            id,
            owner,
            workspace,
            state,
            reason,
            node,
            slots,
            resources,
            tasks,
            recorded,
            placed_at,
        } = record;
        Self {
            id: Some(id.into()),
            owner: owner.to_string(),
            workspace: workspace.to_string(),
            state: state.number(),
            reason: Some(reason.into()),
            node: node.0,
            slots: *slots,
            resources: Some(resources.into()),
            tasks: ranges(tasks),
            recorded: *recorded,
            placed_at: Some(timestamp(*placed_at)),
        }
    }
}

impl TryFrom<v1::Bundle> for BundleRecord {
    type Error = InvalidField;

    fn try_from(message: v1::Bundle) -> Result<Self, InvalidField> {
        let v1::Bundle {
            id,
            owner,
            workspace,
            state,
            reason,
            node,
            slots,
            resources,
            tasks,
            recorded,
            placed_at,
        } = message;
        Ok(Self {
            id: required("id", id)?,
            owner: text("owner", &owner)?,
            workspace: text("workspace", &workspace)?,
            state: enum_field("state", state)?,
            reason: required("reason", reason)?,
            node: node_id("node", node)?,
            slots: positive("slots", slots)?,
            resources: required("resources", resources)?,
            tasks: task_set("tasks", tasks)?,
            recorded,
            placed_at: to_timestamp("placed_at", placed_at)?,
        })
    }
}
