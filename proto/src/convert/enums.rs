//! Closed sets of values. Both directions name every value, so that a new one on either side does not compile until it
//! has its counterpart. The zero value and numbers that this version does not know are refused.

use trainyard_common::logrecord::LogKind;
use trainyard_common::member::EndCause;
use trainyard_common::record::{BundleState, Role, Target};
use trainyard_common::spec::{Launcher, OnDisconnect};
use trainyard_common::state::{
    AttemptState, JobState, MemberPhase, NodeAvailability, NodePolicy, Outcome,
};

use super::InvalidField;
use crate::v1;

/// A closed set of values with a number each on the wire.
pub trait WireEnum: Copy + Sized {
    /// Its number on the wire, never 0.
    fn number(self) -> i32;

    /// The value with this number.
    ///
    /// # Errors
    /// The number is 0, or none that this version knows. The error names no field.
    fn from_number(number: i32) -> Result<Self, InvalidField>;
}

/// The value in an enum field.
///
/// # Errors
/// It is unspecified, or none that this version knows.
pub fn enum_field<T: WireEnum>(field: &str, number: i32) -> Result<T, InvalidField> {
    T::from_number(number).map_err(|e| e.under(field))
}

/// The value in an enum field that may be unspecified.
///
/// # Errors
/// It is none that this version knows.
pub fn optional_enum_field<T: WireEnum>(
    field: &str,
    number: i32,
) -> Result<Option<T>, InvalidField> {
    match number {
        0 => Ok(None),
        number => enum_field(field, number).map(Some),
    }
}

macro_rules! wire_enum {
    ($name:ident, $what:literal, $($variant:ident)+) => {
        impl From<$name> for v1::$name {
            fn from(value: $name) -> Self {
                match value { $($name::$variant => Self::$variant,)+ }
            }
        }

        impl From<&$name> for v1::$name {
            fn from(value: &$name) -> Self {
                Self::from(*value)
            }
        }

        impl TryFrom<v1::$name> for $name {
            type Error = InvalidField;

            fn try_from(value: v1::$name) -> Result<Self, InvalidField> {
                match value {
                    v1::$name::Unspecified => Err(InvalidField::new(
                        "",
                        concat!("is missing or unspecified; ", $what, " is needed"),
                    )),
                    $(v1::$name::$variant => Ok(Self::$variant),)+
                }
            }
        }

        impl WireEnum for $name {
            fn number(self) -> i32 {
                v1::$name::from(self).into()
            }

            fn from_number(number: i32) -> Result<Self, InvalidField> {
                match v1::$name::try_from(number) {
                    Ok(value) => value.try_into(),
                    Err(_) => Err(InvalidField::new(
                        "",
                        format!(concat!("{} is not the number of ", $what, " that this version knows"), number),
                    )),
                }
            }
        }
    };
}

wire_enum!(Launcher, "a launcher", None Torch Torchrun);
wire_enum!(OnDisconnect, "a policy for disconnected nodes", Replace Wait Stop);
wire_enum!(JobState, "a job state",
    Pending Provisioning Preparing Running Stopping Succeeded Failed Cancelled TimedOut);
wire_enum!(AttemptState, "an attempt state", Placed Preparing Ready Running Stopping Ended Lost);
wire_enum!(Outcome, "an outcome", Succeeded Failed Cancelled TimedOut Interrupted);
wire_enum!(MemberPhase, "a member phase",
    Unconfirmed Preparing Ready Running Stopping CleanupPending Uploading Ended);
wire_enum!(EndCause, "a cause of a member's end",
    Completed RankFailed Stopped TimeLimit PrepareFailed CannotExecute SupervisorLost NodeRebooted
    LeaseExpired);
wire_enum!(NodeAvailability, "a node's availability", Ready Unreachable Lost);
wire_enum!(NodePolicy, "a node policy", Active Cordoned Draining);
wire_enum!(BundleState, "a bundle state", Placed Running Closing Stopping Lost);
wire_enum!(Target, "a target", Local Attached);
wire_enum!(Role, "a role", Viewer User Operator Admin);
wire_enum!(LogKind, "a kind of log record", Stdout Stderr Dropped);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Debug;

    use super::*;

    /// `as_str_name` of the wire value with this number.
    type NameOf = fn(i32) -> Option<&'static str>;

    fn check<T: WireEnum + Debug + PartialEq>(all: &[T], prefix: &str, name_of: NameOf) {
        let mut numbers = BTreeSet::new();
        for value in all {
            assert_eq!(T::from_number(value.number()).as_ref(), Ok(value));
            assert!(numbers.insert(value.number()), "{value:?} shares a number");
            let name = name_of(value.number()).expect("has a name");
            let own = name.strip_prefix(prefix).expect("has the prefix");
            let plain = own.replace('_', "").to_lowercase();
            assert_eq!(plain, format!("{value:?}").to_lowercase(), "{name}");
        }
        let unspecified = enum_field::<T>("f", 0)
            .expect_err("0 is unspecified")
            .to_string();
        assert!(
            unspecified.starts_with("f: is missing or unspecified"),
            "{unspecified}"
        );
        assert_eq!(optional_enum_field::<T>("f", 0), Ok(None));
        for unknown in [-1, i32::MIN, i32::MAX, 1 + all.len() as i32] {
            let refused = optional_enum_field::<T>("f", unknown).expect_err("unknown number");
            assert_eq!(refused.field, "f");
            assert!(refused.problem.contains(&unknown.to_string()), "{refused}");
        }
    }

    #[test]
    fn every_value_has_one_number_and_the_rest_is_refused() {
        macro_rules! all {
            ($($name:ident $prefix:literal),+) => {
                $(check($name::ALL, $prefix, |n| v1::$name::try_from(n).ok().map(|v| v.as_str_name()));)+
            };
        }
        all!(
            Launcher "LAUNCHER_",
            OnDisconnect "ON_DISCONNECT_",
            JobState "JOB_STATE_",
            AttemptState "ATTEMPT_STATE_",
            Outcome "OUTCOME_",
            MemberPhase "MEMBER_PHASE_",
            EndCause "END_CAUSE_",
            NodeAvailability "NODE_AVAILABILITY_",
            NodePolicy "NODE_POLICY_",
            BundleState "BUNDLE_STATE_",
            Target "TARGET_",
            Role "ROLE_",
            LogKind "LOG_KIND_"
        );
    }
}
