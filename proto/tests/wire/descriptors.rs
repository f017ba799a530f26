//! What was published keeps its number and type: peers of another version and rows on disk depend on it. New fields,
//! values and calls are welcome; run the test with `TRAINYARD_REGENERATE=1` to put them on the list.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto,
};

/// Set this variable to write the lists that the tests compare with.
pub(crate) const REGENERATE: &str = "TRAINYARD_REGENERATE";

const PACKAGE: &str = "trainyard.v1";

/// A type's name without our package, or the name of a scalar in the file.
fn type_of(field: &FieldDescriptorProto) -> String {
    let name = match field.r#type() {
        Type::Message | Type::Enum => short(field.type_name()),
        scalar => scalar
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    };
    match field.label() {
        Label::Repeated => format!("repeated {name}"),
        _ if field.proto3_optional() => format!("optional {name}"),
        _ => name,
    }
}

fn short(name: &str) -> String {
    let name = name.trim_start_matches('.');
    let own = name
        .strip_prefix(PACKAGE)
        .and_then(|rest| rest.strip_prefix('.'));
    own.unwrap_or(name).to_owned()
}

fn message_lines(outer: &str, message: &DescriptorProto, lines: &mut BTreeSet<String>) {
    let name = format!("{outer}{}", message.name());
    lines.insert(format!("message {name}"));
    for field in &message.field {
        // A field that moves into or out of a oneof changes its meaning, though not its encoding.
        let oneof = match field.oneof_index {
            Some(index) if !field.proto3_optional() => {
                let oneof = &message.oneof_decl[usize::try_from(index).expect("is an index")];
                format!(" in {}", oneof.name())
            }
            _ => String::new(),
        };
        let (number, kind) = (field.number(), type_of(field));
        lines.insert(format!("{name}.{}={number}:{kind}{oneof}", field.name()));
    }
    for nested in &message.nested_type {
        message_lines(&format!("{name}."), nested, lines);
    }
    for nested in &message.enum_type {
        enum_lines(&format!("{name}."), nested, lines);
    }
}

fn enum_lines(outer: &str, values: &EnumDescriptorProto, lines: &mut BTreeSet<String>) {
    let name = format!("{outer}{}", values.name());
    for value in &values.value {
        lines.insert(format!("{name}.{}={}", value.name(), value.number()));
    }
}

fn method_line(service: &str, method: &MethodDescriptorProto) -> String {
    let stream = |yes| if yes { "stream " } else { "" };
    format!(
        "{service}/{}={}{}->{}{}",
        method.name(),
        stream(method.client_streaming()),
        short(method.input_type()),
        stream(method.server_streaming()),
        short(method.output_type()),
    )
}

/// One line for each message, field, enum value and call of our package.
fn published() -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(trainyard_proto::DESCRIPTORS).expect("is built in");
    let mut lines = BTreeSet::new();
    for file in set.file.iter().filter(|file| file.package() == PACKAGE) {
        for message in &file.message_type {
            message_lines("", message, &mut lines);
        }
        for values in &file.enum_type {
            enum_lines("", values, &mut lines);
        }
        for service in &file.service {
            let method = |method| method_line(service.name(), method);
            lines.extend(service.method.iter().map(method));
        }
    }
    lines
}

#[test]
fn nothing_published_is_removed_or_changed() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/descriptors.txt");
    let now = published();
    assert!(
        now.len() > 300,
        "only {} lines: descriptors are missing",
        now.len()
    );
    if std::env::var_os(REGENERATE).is_some() {
        let text: String = now.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&path, text).expect("the list can be written");
    }
    let text = fs::read_to_string(&path).expect("the list is there");
    let listed: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let gone: Vec<_> = listed.difference(&now).collect();
    assert!(
        gone.is_empty(),
        "published and now gone or changed (old peers and stored rows depend on these): {gone:#?}"
    );
    let new: Vec<_> = now.difference(&listed).collect();
    if !new.is_empty() {
        println!("not on the list yet; run this test with {REGENERATE}=1: {new:#?}");
    }
}

#[test]
fn every_enum_starts_with_unspecified() {
    let zeroes: Vec<_> = published()
        .into_iter()
        .filter(|line| line.ends_with("=0"))
        .collect();
    assert!(zeroes.len() >= 12, "{zeroes:?}");
    assert!(
        zeroes.iter().all(|line| line.ends_with("_UNSPECIFIED=0")),
        "{zeroes:?}"
    );
}
