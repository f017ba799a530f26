//! NVML's C types and return codes, as `nvml.h` declares them, and the wrappers through which the exported functions
//! touch a caller's memory. All reading and writing through C pointers happens here; what is written is decided
//! elsewhere.
#![expect(
    unsafe_code,
    reason = "a C interface reads and writes through its caller's pointers"
)]

use std::ffi::{CStr, c_char, c_uint, c_ulonglong, c_void};

/// `nvmlReturn_t`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) c_uint);

impl Code {
    pub(crate) const SUCCESS: Code = Code(0);
    pub(crate) const UNINITIALIZED: Code = Code(1);
    pub(crate) const INVALID_ARGUMENT: Code = Code(2);
    pub(crate) const NOT_SUPPORTED: Code = Code(3);
    pub(crate) const NOT_FOUND: Code = Code(6);
    pub(crate) const INSUFFICIENT_SIZE: Code = Code(7);
    pub(crate) const DRIVER_NOT_LOADED: Code = Code(9);
    pub(crate) const TIMEOUT: Code = Code(10);
    pub(crate) const GPU_IS_LOST: Code = Code(15);
    pub(crate) const ARGUMENT_VERSION_MISMATCH: Code = Code(25);
    pub(crate) const UNKNOWN: Code = Code(999);

    /// Name without the prefix `NVML_ERROR_`, number, and the sentence of `nvmlErrorString`.
    const TABLE: &[(&str, Code, &CStr)] = &[
        ("SUCCESS", Code::SUCCESS, c"Success"),
        ("UNINITIALIZED", Code::UNINITIALIZED, c"Uninitialized"),
        (
            "INVALID_ARGUMENT",
            Code::INVALID_ARGUMENT,
            c"Invalid Argument",
        ),
        ("NOT_SUPPORTED", Code::NOT_SUPPORTED, c"Not Supported"),
        ("NO_PERMISSION", Code(4), c"Insufficient Permissions"),
        ("NOT_FOUND", Code::NOT_FOUND, c"Not Found"),
        (
            "INSUFFICIENT_SIZE",
            Code::INSUFFICIENT_SIZE,
            c"Insufficient Size",
        ),
        (
            "INSUFFICIENT_POWER",
            Code(8),
            c"Insufficient External Power",
        ),
        (
            "DRIVER_NOT_LOADED",
            Code::DRIVER_NOT_LOADED,
            c"Driver Not Loaded",
        ),
        ("TIMEOUT", Code::TIMEOUT, c"Timeout"),
        ("IRQ_ISSUE", Code(11), c"Interrupt Request Issue"),
        (
            "LIBRARY_NOT_FOUND",
            Code(12),
            c"NVML Shared Library Not Found",
        ),
        ("FUNCTION_NOT_FOUND", Code(13), c"Function Not Found"),
        ("CORRUPTED_INFOROM", Code(14), c"Corrupted infoROM"),
        ("GPU_IS_LOST", Code::GPU_IS_LOST, c"GPU is lost"),
        ("RESET_REQUIRED", Code(16), c"GPU requires reset"),
        (
            "OPERATING_SYSTEM",
            Code(17),
            c"GPU access blocked by the operating system",
        ),
        (
            "LIB_RM_VERSION_MISMATCH",
            Code(18),
            c"Driver/library version mismatch",
        ),
        ("IN_USE", Code(19), c"In use by another client"),
        ("MEMORY", Code(20), c"Insufficient Memory"),
        ("NO_DATA", Code(21), c"No data"),
        (
            "ARGUMENT_VERSION_MISMATCH",
            Code::ARGUMENT_VERSION_MISMATCH,
            c"Argument version mismatch",
        ),
        ("UNKNOWN", Code::UNKNOWN, c"Unknown Error"),
    ];

    /// The error called `name`, with or without `NVML_ERROR_`; not `SUCCESS`, which is none.
    pub(crate) fn from_name(name: &str) -> Option<Code> {
        let name = name.strip_prefix("NVML_ERROR_").unwrap_or(name);
        let row = Code::TABLE.iter().find(|(known, ..)| *known == name)?;
        (row.1 != Code::SUCCESS).then_some(row.1)
    }

    /// What `nvmlErrorString` says of it.
    pub(crate) fn sentence(self) -> &'static CStr {
        let row = Code::TABLE.iter().find(|(_, code, _)| *code == self);
        row.map_or(c"Unknown Error", |row| row.2)
    }
}

impl From<Result<(), Code>> for Code {
    fn from(result: Result<(), Code>) -> Code {
        result.err().unwrap_or(Code::SUCCESS)
    }
}

/// A pointer argument for the caller to pass memory with. Its field is private to this module, so that a value comes
/// only from a C caller, who by NVML's contract passes null or memory valid for one `T` (or for as many as the length
/// argument beside it says), used by no other thread during the call. That is what the functions below rest on.
#[repr(transparent)]
#[derive(Debug)]
pub(crate) struct Out<T>(*mut T);

impl<T: Copy> Out<T> {
    /// Whether the caller passed null.
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Writes one value.
    pub(crate) fn put(&self, value: T) -> Result<(), Code> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, hence valid for writing one `T` by the contract in the type's comment.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// Reads the value that the caller put there, for arguments that go both ways.
    pub(crate) fn get(&self) -> Result<T, Code> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, hence valid and initialised by the contract in the type's comment; every `T` in use is a
        // plain C struct of integers, for which any bits are a value.
        Ok(unsafe { self.0.read() })
    }

    /// Writes `values` into an array with room for `capacity`.
    pub(crate) fn put_all(&self, capacity: c_uint, values: &[T]) -> Result<(), Code> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        if values.len() > capacity as usize {
            return Err(Code::INSUFFICIENT_SIZE);
        }
        // SAFETY: not null, hence valid for `capacity` values by the contract in the type's comment, and `values` has
        // no more than that; the caller's memory cannot overlap a slice that this library owns.
        unsafe {
            self.0
                .copy_from_nonoverlapping(values.as_ptr(), values.len())
        };
        Ok(())
    }
}

impl Out<c_char> {
    /// Writes a text and its terminating zero into a buffer of `length` bytes.
    pub(crate) fn put_text(&self, length: c_uint, text: &str) -> Result<(), Code> {
        let bytes = text.bytes().filter(|byte| *byte != 0).chain([0]);
        let chars: Vec<c_char> = bytes.map(|byte| c_char::from_ne_bytes([byte])).collect();
        self.put_all(length, &chars)
    }
}

/// A C string argument; like [`Out`], it comes only from a C caller.
#[repr(transparent)]
#[derive(Debug)]
pub(crate) struct Text(*const c_char);

impl Text {
    /// A copy of the text; null and anything but UTF-8 are invalid arguments.
    pub(crate) fn read(&self) -> Result<String, Code> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, hence a zero-terminated string by NVML's contract, which nobody changes during the call.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str()
            .map(str::to_owned)
            .map_err(|_| Code::INVALID_ARGUMENT)
    }
}

/// `nvmlDevice_t`: opaque to callers; here a number, never an address that is followed.
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceHandle(*mut c_void);

/// `nvmlEventSet_t`: opaque to callers; here a number, never an address that is followed.
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct SetHandle(*mut c_void);

/// Numbers of handles start here, so that null, small integers and other kinds of handle are not valid ones.
const FIRST_DEVICE: usize = 0x4750_0000;
const FIRST_SET: usize = 0x4556_0000;

impl DeviceHandle {
    /// The handle of GPU `index`.
    pub(crate) fn of(index: u32) -> DeviceHandle {
        DeviceHandle(std::ptr::without_provenance_mut(
            FIRST_DEVICE + index as usize,
        ))
    }

    /// Which GPU it stands for, if it is a handle at all.
    pub(crate) fn index(self) -> Option<u32> {
        self.0.addr().checked_sub(FIRST_DEVICE)?.try_into().ok()
    }
}

impl SetHandle {
    /// The handle of event set `number`.
    pub(crate) fn of(number: u32) -> SetHandle {
        SetHandle(std::ptr::without_provenance_mut(
            FIRST_SET + number as usize,
        ))
    }

    /// Which event set it stands for, if it is a handle at all.
    pub(crate) fn number(self) -> Option<u32> {
        self.0.addr().checked_sub(FIRST_SET)?.try_into().ok()
    }
}

/// `nvmlPciInfo_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct PciInfo {
    pub(crate) bus_id_legacy: [c_char; 16],
    pub(crate) domain: c_uint,
    pub(crate) bus: c_uint,
    pub(crate) device: c_uint,
    pub(crate) pci_device_id: c_uint,
    pub(crate) pci_sub_system_id: c_uint,
    pub(crate) bus_id: [c_char; 32],
}

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) total: c_ulonglong,
    pub(crate) free: c_ulonglong,
    pub(crate) used: c_ulonglong,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct MemoryV2 {
    pub(crate) version: c_uint,
    pub(crate) total: c_ulonglong,
    pub(crate) reserved: c_ulonglong,
    pub(crate) free: c_ulonglong,
    pub(crate) used: c_ulonglong,
}

impl MemoryV2 {
    /// NVML's `NVML_STRUCT_VERSION(Memory, 2)`: the struct's size with the version in the top byte.
    pub(crate) const VERSION: c_uint = size_of::<MemoryV2>() as c_uint | (2 << 24);
}

/// `nvmlUtilization_t`, in percent.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Utilization {
    pub(crate) gpu: c_uint,
    pub(crate) memory: c_uint,
}

/// `nvmlProcessInfo_t` of the `_v3` functions.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProcessInfo {
    pub(crate) pid: c_uint,
    pub(crate) used_gpu_memory: c_ulonglong,
    pub(crate) gpu_instance_id: c_uint,
    pub(crate) compute_instance_id: c_uint,
}

/// `nvmlEventData_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct EventData {
    pub(crate) device: DeviceHandle,
    pub(crate) event_type: c_ulonglong,
    pub(crate) event_data: c_ulonglong,
    pub(crate) gpu_instance_id: c_uint,
    pub(crate) compute_instance_id: c_uint,
}

/// What NVML puts into instance ids of a GPU that is not divided.
pub(crate) const NO_INSTANCE: c_uint = c_uint::MAX;

// The layouts of nvml.h on 64-bit Linux, which callers rely on.
const _: () = assert!(size_of::<PciInfo>() == 68);
const _: () = assert!(size_of::<Memory>() == 24);
const _: () = assert!(size_of::<MemoryV2>() == 40);
const _: () = assert!(size_of::<Utilization>() == 8);
const _: () = assert!(size_of::<ProcessInfo>() == 24);
const _: () = assert!(size_of::<EventData>() == 32);

/// A text in a fixed array of C chars, cut if it is too long and always zero-terminated.
pub(crate) fn char_array<const N: usize>(text: &str) -> [c_char; N] {
    let mut array = [0; N];
    for (slot, byte) in array.iter_mut().take(N.saturating_sub(1)).zip(text.bytes()) {
        *slot = c_char::from_ne_bytes([byte]);
    }
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_pointers_are_invalid_arguments() {
        let out: Out<c_uint> = Out(std::ptr::null_mut());
        assert_eq!(out.put(1), Err(Code::INVALID_ARGUMENT));
        assert_eq!(out.get(), Err(Code::INVALID_ARGUMENT));
        assert_eq!(out.put_all(1, &[1]), Err(Code::INVALID_ARGUMENT));
        assert_eq!(Text(std::ptr::null()).read(), Err(Code::INVALID_ARGUMENT));
    }

    #[test]
    fn texts_need_room_for_their_zero() {
        let mut buffer: [c_char; 4] = [1; 4];
        let out = Out(buffer.as_mut_ptr());
        assert_eq!(out.put_text(4, "four"), Err(Code::INSUFFICIENT_SIZE));
        assert_eq!(buffer, [1; 4]);
        let out = Out(buffer.as_mut_ptr());
        assert_eq!(out.put_text(4, "GPU"), Ok(()));
        assert_eq!(buffer, char_array("GPU"));
    }

    #[test]
    fn handles_keep_their_numbers_and_null_is_none() {
        assert_eq!(DeviceHandle::of(63).index(), Some(63));
        assert_eq!(SetHandle::of(7).number(), Some(7));
        assert_eq!(DeviceHandle(std::ptr::null_mut()).index(), None);
        assert_eq!(SetHandle(std::ptr::null_mut()).number(), None);
    }

    #[test]
    fn names_of_errors_lead_to_their_codes() {
        assert_eq!(Code::from_name("GPU_IS_LOST"), Some(Code(15)));
        assert_eq!(
            Code::from_name("NVML_ERROR_DRIVER_NOT_LOADED"),
            Some(Code(9))
        );
        assert_eq!(Code::from_name("SUCCESS"), None);
        assert_eq!(Code::from_name("nonsense"), None);
        assert_eq!(Code(15).sentence(), c"GPU is lost");
        assert_eq!(Code(12345).sentence(), c"Unknown Error");
    }
}
