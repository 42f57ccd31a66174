//! Source files and lines from debug information (DWARF).

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

use addr2line::Context;
use addr2line::gimli::{Dwarf, Error};

use super::metered::Metered;
use super::names;

/// The sections that matter here.
pub(super) const SECTIONS: [&str; 9] = [
    ".debug_abbrev",
    ".debug_addr",
    ".debug_info",
    ".debug_line",
    ".debug_line_str",
    ".debug_ranges",
    ".debug_rnglists",
    ".debug_str",
    ".debug_str_offsets",
];

/// Most reads of debug information for one trace: about 10 ms. A module with Rust's standard
/// library takes 200 000.
const MAX_READS: u64 = 2_000_000;

/// One trace is looked up at a time, because a read may become some dozen bytes of memory.
static READING: Mutex<()> = Mutex::new(());

/// Most places of one frame. Functions are inlined in some levels of others.
const MAX_PLACES: usize = 16;

/// A function and a line of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) function: Option<String>,
    pub(super) source: Option<(String, Option<u32>)>,
}

/// The places of each address, beginning with the innermost inlined function. What is damaged or
/// takes too long to read has no places.
pub(super) fn find<'a>(section: impl Fn(&str) -> &'a [u8], addresses: &[Option<u64>]) -> Vec<Vec<Place>> {
    find_within(MAX_READS, section, addresses)
}

fn find_within<'a>(reads: u64, section: impl Fn(&str) -> &'a [u8], addresses: &[Option<u64>]) -> Vec<Vec<Place>> {
    let _reading = READING.lock().unwrap_or_else(PoisonError::into_inner);
    let left = Cell::new(reads);
    let dwarf = Dwarf::load(|id| Ok::<_, Error>(Metered::new(section(id.name()), &left)));
    let Ok(context) = dwarf.and_then(Context::from_dwarf) else { return Vec::new() };
    addresses.iter().map(|address| address.and_then(|address| places(&context, address).ok()).unwrap_or_default()).collect()
}

fn places(context: &Context<Metered<'_>>, address: u64) -> Result<Vec<Place>, Error> {
    let mut frames = context.find_frames(address).skip_all_loads()?;
    let mut places = Vec::new();
    while let Some(frame) = frames.next()?
        && places.len() < MAX_PLACES
    {
        let function = frame.function.as_ref().and_then(|function| Some(names::demangled(&function.raw_name().ok()?)));
        let source = frame.location.and_then(|location| Some((location.file?.to_owned(), location.line)));
        places.push(Place { function, source });
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use gimli::write::{
        Address, AttributeValue, DwarfUnit, EndianVec, FileId, LineProgram, LineString, Range, RangeList, Sections, Unit, UnitEntryId,
    };
    use gimli::{
        DW_AT_abstract_origin, DW_AT_call_file, DW_AT_call_line, DW_AT_comp_dir, DW_AT_high_pc, DW_AT_linkage_name, DW_AT_low_pc,
        DW_AT_name, DW_AT_ranges, DW_AT_stmt_list, DW_TAG_inlined_subroutine, DW_TAG_subprogram, DwTag, Encoding, Format, LineEncoding,
        LittleEndian,
    };

    use super::*;

    type Debug = HashMap<&'static str, Vec<u8>>;

    fn entry(unit: &mut Unit, parent: UnitEntryId, tag: DwTag, range: std::ops::Range<u64>) -> UnitEntryId {
        let entry = unit.add(parent, tag);
        unit.get_mut(entry).set(DW_AT_low_pc, AttributeValue::Address(Address::Constant(range.start)));
        unit.get_mut(entry).set(DW_AT_high_pc, AttributeValue::Udata(range.end - range.start));
        entry
    }

    /// A function `hook` from 16 to 64, into which `my_policy::check` is inlined from 32 to 48.
    fn debug() -> Debug {
        let encoding = Encoding { format: Format::Dwarf32, version: 4, address_size: 4 };
        let mut dwarf = DwarfUnit::new(encoding);
        let text = |text: &str| LineString::String(text.into());
        let mut lines = LineProgram::new(encoding, LineEncoding::default(), text("/policy"), None, text("src/hook.rs"), None);
        let directory = lines.default_directory();
        let files: Vec<FileId> = ["src/hook.rs", "src/check.rs"].map(|file| lines.add_file(text(file), directory, None)).into();
        lines.begin_sequence(Some(Address::Constant(16)));
        for (offset, file, line) in [(0, 0, 5), (16, 1, 12), (32, 0, 7)] {
            lines.row().address_offset = offset;
            lines.row().file = files[file];
            lines.row().line = line;
            lines.generate_row();
        }
        lines.end_sequence(48);
        let unit = &mut dwarf.unit;
        unit.line_program = lines;
        let root = unit.root();
        let string = |text: &str| AttributeValue::String(text.into());
        let ranges = unit.ranges.add(RangeList(vec![Range::StartEnd { begin: Address::Constant(16), end: Address::Constant(64) }]));
        unit.get_mut(root).set(DW_AT_ranges, AttributeValue::RangeListRef(ranges));
        unit.get_mut(root).set(DW_AT_stmt_list, AttributeValue::LineProgramRef);
        unit.get_mut(root).set(DW_AT_comp_dir, string("/policy"));
        let check = unit.add(root, DW_TAG_subprogram);
        unit.get_mut(check).set(DW_AT_linkage_name, string("_ZN9my_policy5check17h0123456789abcdefE"));
        let hook = entry(unit, root, DW_TAG_subprogram, 16..64);
        unit.get_mut(hook).set(DW_AT_name, string("hook"));
        let inlined = entry(unit, hook, DW_TAG_inlined_subroutine, 32..48);
        unit.get_mut(inlined).set(DW_AT_abstract_origin, AttributeValue::UnitRef(check));
        unit.get_mut(inlined).set(DW_AT_call_file, AttributeValue::FileIndex(Some(files[0])));
        unit.get_mut(inlined).set(DW_AT_call_line, AttributeValue::Udata(6));

        let mut sections = Sections::new(EndianVec::new(LittleEndian));
        dwarf.write(&mut sections).unwrap();
        let mut debug = Debug::new();
        sections
            .for_each(|id, bytes| {
                debug.insert(id.name(), bytes.slice().to_vec());
                Ok::<_, ()>(())
            })
            .unwrap();
        debug
    }

    fn found(debug: &Debug, reads: u64, address: u64) -> Vec<String> {
        let places = find_within(reads, |name| debug.get(name).map_or(&[][..], Vec::as_slice), &[None, Some(address)]);
        let shown = |Place { function, source }: Place| format!("{} {:?}", function.unwrap_or_default(), source.unwrap_or_default());
        places.into_iter().flatten().map(shown).collect()
    }

    #[test]
    fn inlined_functions_have_places_of_their_own() {
        let debug = debug();
        assert_eq!(
            found(&debug, MAX_READS, 40),
            [r#"my_policy::check ("/policy/src/check.rs", Some(12))"#, r#"hook ("/policy/src/hook.rs", Some(6))"#]
        );
        assert_eq!(found(&debug, MAX_READS, 20), [r#"hook ("/policy/src/hook.rs", Some(5))"#]);
        assert_eq!(found(&debug, MAX_READS, 50), [r#"hook ("/policy/src/hook.rs", Some(7))"#]);
        assert!(found(&debug, MAX_READS, 64).is_empty() && found(&Debug::new(), MAX_READS, 40).is_empty());
    }

    #[test]
    fn reading_is_bounded() {
        let debug = debug();
        let enough = (0..10_000).find(|reads| found(&debug, *reads, 40).len() == 2).unwrap();
        assert!(enough > 100, "{enough}");
        assert!(found(&debug, enough / 2, 40).is_empty());
    }

    #[test]
    fn damaged_information_does_no_harm() {
        let sound = debug();
        for (name, bytes) in &sound {
            for (at, byte) in bytes.iter().enumerate() {
                for value in [0, 1, 0x7f, 0x80, 0xff, byte.wrapping_add(1)] {
                    let mut debug = sound.clone();
                    debug.get_mut(name).unwrap()[at] = value;
                    assert!(found(&debug, 100_000, 40).len() <= MAX_PLACES);
                }
            }
        }
    }
}
